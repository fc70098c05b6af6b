"""A Hugging Face hub of one folder, as its client asks it.

Models lie in OWNER/NAME/, datasets in datasets/OWNER/NAME/.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import pathlib
import re
import threading
import urllib.parse

_FILE = re.compile(r'/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)')
_LIST = re.compile(r'/api/(datasets/[^/]+/[^/]+)/(tree|revision)/(.+)')
_UPLOAD = re.compile(r'/api/models/([^/]+/[^/]+)/(preupload|commit)/main')
_COMMIT = '0123456789' * 4


class _Handler(http.server.BaseHTTPRequestHandler):
  def do_HEAD(self):
    self._answer(with_body=False)

  def do_GET(self):
    self._answer(with_body=True)

  def do_POST(self):
    body = self.rfile.read(int(self.headers['Content-Length']))
    answer = {'errors': [], 'warnings': []}  # Of a card: it is not looked at.
    if asked := _UPLOAD.fullmatch(self.path):
      repo, what = asked.groups()
      upload = self._list_modes if what == 'preupload' else self._commit
      answer = upload(repo, body)
    self._send_json(answer, True)

  def log_message(self, *_):
    pass

  def _list_modes(self, _, body):
    return {
      'files': [
        {'path': x['path'], 'uploadMode': 'regular', 'shouldIgnore': False}
        for x in json.loads(body)['files']
      ]
    }

  def _commit(self, repo, body):
    for line in map(json.loads, body.splitlines()):
      if line['key'] == 'file':
        path = self.server.hub.folder / repo / line['value']['path']
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(line['value']['content']))
    url = f'{self.server.hub.url}/{repo}/commit/{_COMMIT}'
    return {'success': True, 'commitOid': _COMMIT, 'commitUrl': url}

  def _answer(self, with_body):
    hub, path = self.server.hub, urllib.parse.unquote(self.path)
    hub.requests.append((self.command, path))
    if path.startswith('/content/'):
      return self._send(hub.content[path.removeprefix('/content/')], with_body)
    if asked := _LIST.fullmatch(path.partition('?')[0]):
      return self._list(*asked.groups(), with_body)
    if not (asked := _FILE.fullmatch(path)):  # What the client has to tell.
      return self._send(b'', with_body, 404)
    repo, _, name = asked.groups()
    file = hub.folder / repo / name
    if not file.is_file():
      known = (hub.folder / repo).is_dir()
      what = 'EntryNotFound' if known else 'RepoNotFound'
      return self._send_error(what, with_body)
    data = file.read_bytes()
    if not name.endswith('.safetensors'):
      tag = hashlib.sha1(data).hexdigest()
      return self._send(data, with_body, ETag=f'"{tag}"')
    # Large files lie on another host.
    digest = hashlib.sha256(data).hexdigest()
    hub.content.setdefault(digest, data)
    host = hub.url.replace('127.0.0.1', 'localhost')
    headers = {
      'Location': f'{host}/content/{digest}',
      'X-Linked-Etag': f'"{digest}"',
      'X-Linked-Size': str(len(data)),
    }
    return self._send(b'', with_body, 302, **headers)

  def _list(self, repo, what, revision, with_body):
    hub, folder = self.server.hub, self.server.hub.folder / repo
    if not folder.is_dir():
      return self._send_error('RepoNotFound', with_body)
    if revision not in (hub.branch, _COMMIT):
      return self._send_error('RevisionNotFound', with_body)
    files = [
      {
        'type': 'file',
        'path': str(x.relative_to(folder)),
        'size': x.stat().st_size,
        'oid': hashlib.sha1(x.read_bytes()).hexdigest(),
      }
      for x in sorted(folder.rglob('*'))
      if x.is_file()
    ]
    answer = {'id': repo, 'sha': _COMMIT, 'siblings': []}
    return self._send_json(files if what == 'tree' else answer, with_body)

  def _send_error(self, what, with_body):
    self._send(b'', with_body, 404, **{'X-Error-Code': what})

  def _send_json(self, answer, with_body):
    headers = {'Content-Type': 'application/json'}
    self._send(json.dumps(answer).encode(), with_body, **headers)

  def _send(self, data, with_body, status=200, **headers):
    self.send_response(status)
    headers |= {'X-Repo-Commit': _COMMIT, 'Content-Length': str(len(data))}
    for name, value in headers.items():
      self.send_header(name, value)
    self.end_headers()
    if with_body:
      self.wfile.write(data)


class Hub:
  """What it has, and what it was asked for."""

  def __init__(self, folder: pathlib.Path, branch: str = 'main'):
    # All that datasets have is on one branch.
    self.folder, self.branch = folder, branch
    self.requests: list[tuple[str, str]] = []
    # SHA-256 -> what is sent for it.
    self.content: dict[str, bytes] = {}
    self._server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
    self._server.hub = self
    self.url = f'http://127.0.0.1:{self._server.server_port}'

  @contextlib.contextmanager
  def running(self):
    """Answers within, and is gone after it: there is no network then."""
    thread = threading.Thread(target=self._server.serve_forever, daemon=True)
    thread.start()
    try:
      yield self
    finally:
      self._server.shutdown()
      self._server.server_close()
      thread.join()
