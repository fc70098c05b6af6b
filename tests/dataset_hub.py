"""A Hugging Face Hub in this process: as much of it as downloads ask for."""

import contextlib
import functools
import hashlib
import http.server
import json
import pathlib
import re
import threading
from collections.abc import Iterator

COMMIT = hashlib.sha1(b'commit').hexdigest()
_TREE = re.compile(r'/api/datasets/(.+?)/tree/[^/]+')
_REVISION = re.compile(r'/api/datasets/(.+?)/revision/(.+)')
_FILE = re.compile(r'/datasets/(.+?)/resolve/[^/]+/(.+)')


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers for the folders OWNER/NAME below one; all have a single branch."""

  protocol_version = 'HTTP/1.1'

  def __init__(self, root, branch, requests, *args):
    self.root, self.branch, self.requests = root, branch, requests
    super().__init__(*args)

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    path = self.path.partition('?')[0].replace('%2F', '/')
    self.requests.append(f'{self.command} {path}')
    if found := _FILE.fullmatch(path):
      file = self.root / found[1] / found[2]
      if file.is_file():
        data = file.read_bytes()
        etag = hashlib.sha256(data).hexdigest()
        return self._send(200, data, {'ETag': f'"{etag}"'})
      return self._send(404, b'', {'X-Error-Code': 'EntryNotFound'})
    found = _TREE.fullmatch(path) or _REVISION.fullmatch(path)
    if found is None or not (self.root / found[1]).is_dir():
      return self._send(404, b'{}', {'X-Error-Code': 'RepoNotFound'})
    repository = self.root / found[1]
    if found.re is _REVISION:
      if found[2] not in (self.branch, COMMIT):
        return self._send(404, b'{}', {'X-Error-Code': 'RevisionNotFound'})
      return self._send_json({'id': found[1], 'sha': COMMIT, 'siblings': []})
    return self._send_json(
      [
        {
          'type': 'file',
          'path': str(x.relative_to(repository)),
          'size': x.stat().st_size,
          'oid': hashlib.sha1(x.read_bytes()).hexdigest(),
        }
        for x in sorted(repository.rglob('*'))
        if x.is_file()
      ]
    )

  def _send_json(self, value):
    self._send(200, json.dumps(value).encode(), {})

  def _send(self, status, data, headers):
    self.send_response(status)
    headers = {'X-Repo-Commit': COMMIT, **headers}
    for name, value in headers.items():
      self.send_header(name, value)
    self.send_header('Content-Length', str(len(data)))
    self.end_headers()
    if self.command == 'GET':
      self.wfile.write(data)

  def log_message(self, *args):
    pass


@contextlib.contextmanager
def serving(
  root: pathlib.Path, branch: str = 'main'
) -> Iterator[tuple[str, list[str]]]:
  """Yields the URL of a Hub of the folders in one, and what it is asked for."""
  requests: list[str] = []
  handler = functools.partial(Handler, root, branch, requests)
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
      yield f'http://127.0.0.1:{server.server_port}', requests
    finally:
      server.shutdown()
      thread.join()
