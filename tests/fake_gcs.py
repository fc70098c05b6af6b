"""A Google Cloud Storage in this process, with faults to order.

It speaks the JSON API as gcsfs, tensorstore and array_record use it, and keeps
what Google promises of an object: whole or not there, one generation after the
other, and preconditions that hold for one alone.

`python tests/fake_gcs.py --port=9000 --bucket=test-bucket --folder=/tmp/kept`
runs by itself, and prints the variables that send a program there.
"""

import argparse
import base64
import collections
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import http.server
import itertools
import json
import math
import os
import pathlib
import random
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import NamedTuple
from unittest import mock

# It comes with gcsfs; in Python a checkpoint would take seconds.
import google_crc32c

# Of a chunk that is not the last, what is more is not kept.
_GRANULE = 256 << 10
_PAGE = 1000
# Where another process orders faults and reads the requests.
CONTROL = '/control'

_OBJECTS = re.compile(r'/storage/v1/b/([^/]+)/o/?')
_OBJECT = re.compile(r'(?:/download)?/storage/v1/b/([^/]+)/o/(.+)')
_COPY = re.compile(
  r'/storage/v1/b/([^/]+)/o/(.+)/(copyTo|rewriteTo)/b/([^/]+)/o/(.+)'
)
_UPLOAD = re.compile(r'(?:/resumable)?/upload/storage/v1/b/([^/]+)/o/?')
_BUCKET = re.compile(r'/storage/v1/b/([^/]+)/?')
_PLAIN = re.compile(r'/([^/]+)/(.+)')


class Request(NamedTuple):
  """An answered request; `what` is one of list, read, stat, write, delete...

  `time` is that of the clock, in seconds; `fault` is the one that it met.
  """

  method: str
  what: str
  bucket: str
  name: str
  status: int
  received: int
  sent: int
  time: float
  fault: str


@dataclasses.dataclass
class Fault:
  """What befalls requests.

  `kind` is the status of an answer, such as '503'; 'reset': the connection ends
  before anything is done; 'lost': it ends after that; 'cut': in the middle of
  the answer; 'slow': the answer waits for `seconds`, or till all is healed;
  'flip': a bit of the object is another in the answer.

  A `share` of the requests is chosen, `count` of them at most, of those whose
  `what` and whose object match; '' matches all.
  """

  kind: str
  share: float = 1.0
  count: float = math.inf
  what: str = ''
  match: str = ''
  seconds: float = 0.0
  healed: threading.Event = dataclasses.field(default_factory=threading.Event)


@dataclasses.dataclass(frozen=True)
class Object:
  data: bytes
  generation: int
  content_type: str
  updated: str
  metadata: Mapping[str, str]

  @functools.cached_property
  def sums(self) -> dict[str, str]:
    crc = google_crc32c.value(self.data).to_bytes(4, 'big')
    md5 = hashlib.md5(self.data).digest()
    found = {'md5Hash': md5, 'crc32c': crc}
    return {k: base64.b64encode(v).decode() for k, v in found.items()}


class Answer(Exception):  # noqa: N818
  """What is answered; raised where it is known."""

  def __init__(self, status: int, body: bytes | Mapping = b'', **headers: str):
    self.status, self.headers = status, headers
    if not isinstance(body, bytes):
      self.headers.setdefault('Content-Type', 'application/json')
      body = json.dumps(body).encode()
    self.body = body


def refuse(status: int, message: str) -> Answer:
  error = {'code': status, 'message': message}
  error['errors'] = [{'message': message, 'reason': message.split()[0]}]
  return Answer(status, {'error': error})


class Server(http.server.ThreadingHTTPServer):
  """The server, and what a test does with it directly."""

  daemon_threads = True
  block_on_close = False
  request_queue_size = 128

  def __init__(
    self,
    buckets: tuple[str, ...],
    port: int = 0,
    folder: pathlib.Path | None = None,
    seed: int = 0,
  ) -> None:
    super().__init__(('127.0.0.1', port), Handler)
    self.url = f'http://127.0.0.1:{self.server_port}'
    self.environ = {
      'STORAGE_EMULATOR_HOST': self.url,
      'TENSORSTORE_GCS_HTTP_URL': self.url,
      'CLOUD_STORAGE_EMULATOR_ENDPOINT': self.url,
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'nobody',
    }
    self.lock = threading.RLock()
    self.connections: set[socket.socket] = set()
    self.requests: list[Request] = []
    self.faults: list[Fault] = []
    # Of (bucket, 'read' or 'write').
    self.forbidden: set[tuple[str, str]] = set()
    self.random = random.Random(seed)
    self.uploads: dict[str, dict] = {}
    self._generations = itertools.count(time.time_ns() // 1000)
    self._buckets: dict[str, dict[str, Object]] = {b: {} for b in buckets}
    self._folder = folder
    for bucket in buckets if folder else ():
      place = folder / bucket
      place.mkdir(parents=True, exist_ok=True)
      for path in place.iterdir():
        self.put(bucket, urllib.parse.unquote(path.name), path.read_bytes())

  def order(self, kind: str, **options) -> Fault:
    """Has requests meet a fault from now on; see Fault."""
    fault = Fault(kind, **options)
    with self.lock:
      self.faults.append(fault)
    return fault

  def heal(self) -> None:
    """Ends all faults and permits everything."""
    with self.lock:
      for fault in self.faults:
        fault.healed.set()
      self.faults.clear()
      self.forbidden.clear()

  def forbid(self, bucket: str, what: str = 'write') -> None:
    self.forbidden.add((bucket, what))

  def clear(self) -> list[Request]:
    """Forgets the requests so far and returns them."""
    with self.lock:
      found, self.requests = self.requests, []
    return found

  def counts(self) -> dict[str, int]:
    """Returns how many requests of each kind there were."""
    with self.lock:
      return dict(collections.Counter(x.what for x in self.requests))

  def objects(self, bucket: str) -> dict[str, bytes]:
    with self.lock:
      return {k: x.data for k, x in sorted(self.bucket(bucket).items())}

  def bucket(self, bucket: str) -> dict[str, Object]:
    try:
      return self._buckets[bucket]
    except KeyError:
      message = 'notFound: The specified bucket does not exist.'
      raise refuse(404, message) from None

  def put(
    self,
    bucket: str,
    name: str,
    data: bytes,
    content_type: str = 'application/octet-stream',
    metadata: Mapping[str, str] | None = None,
  ) -> Object:
    with self.lock:
      now = datetime.datetime.now(datetime.UTC).isoformat()
      updated = now.replace('+00:00', 'Z')
      new = Object(
        data, next(self._generations), content_type, updated, metadata or {}
      )
      self.bucket(bucket)[name] = new
      if self._folder:
        self._file(bucket, name).write_bytes(data)
      return new

  def delete(self, bucket: str, name: str) -> None:
    with self.lock:
      del self.bucket(bucket)[name]
      if self._folder:
        self._file(bucket, name).unlink()

  def flip(self, bucket: str, name: str) -> None:
    """Flips a bit in the middle of an object, as a new generation."""
    self.put(bucket, name, flipped(self.objects(bucket)[name]))

  def close(self) -> None:
    """Stops answering, and ends the connections that there are."""
    self.heal()
    self.shutdown()
    self.server_close()
    with self.lock:
      for x in self.connections:
        with contextlib.suppress(OSError):
          x.shutdown(socket.SHUT_RDWR)

  def handle_error(self, request, client_address) -> None:
    """Says nothing of clients that have gone."""

  def _file(self, bucket: str, name: str) -> pathlib.Path:
    return self._folder / bucket / urllib.parse.quote(name, safe='')


@contextlib.contextmanager
def serve(
  buckets: tuple[str, ...] = ('test-bucket',),
  port: int = 0,
  folder: pathlib.Path | None = None,
  seed: int = 0,
) -> Iterator[Server]:
  """Yields a server that this process knows, until the block ends."""
  server = Server(buckets, port, folder, seed)
  threading.Thread(target=server.serve_forever, args=(0.05,)).start()
  try:
    with mock.patch.dict(os.environ, server.environ):
      yield server
  finally:
    server.close()


def flipped(data: bytes) -> bytes:
  middle = len(data) // 2
  return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers the requests of one connection."""

  server: Server
  protocol_version = 'HTTP/1.1'
  # Together an answer is one packet, which waits for nobody.
  wbufsize = -1
  disable_nagle_algorithm = True

  def setup(self) -> None:
    super().setup()
    with self.server.lock:
      self.server.connections.add(self.connection)

  def finish(self) -> None:
    with self.server.lock:
      self.server.connections.discard(self.connection)
    with contextlib.suppress(OSError):
      super().finish()

  def log_message(self, *args) -> None:
    """Leaves stderr alone; the requests are kept."""

  def _handle(self) -> None:
    url = urllib.parse.urlsplit(self.path)
    query = urllib.parse.parse_qs(url.query, keep_blank_values=True)
    self.query = {k: v[-1] for k, v in query.items()}
    self.what, self.bucket, self.name = '', '', ''
    self.body = self._read_body()
    if url.path.startswith(CONTROL):
      self._send(self._control(url.path))
      return
    route = self._route(url.path)
    fault = self._meet()
    kind = fault.kind if fault else ''
    if kind == 'slow':
      fault.healed.wait(fault.seconds)
    if kind.isdigit():
      answer = refuse(int(kind), 'backendError: ordered by a test')
    elif kind == 'reset':
      answer = Answer(0)
    else:
      try:
        self._check_permission()
        answer = route()
      except Answer as e:
        answer = e
    body = answer.body
    if kind == 'flip' and self.what == 'read' and body:
      answer.body = flipped(body)
    sent = (
      0 if kind in ('reset', 'lost') or self.command == 'HEAD' else len(body)
    )
    sent = sent // 2 if kind == 'cut' else sent
    about = (self.command, self.what, self.bucket, self.name, answer.status)
    with self.server.lock:
      # Before the client knows: a test that has the answer may count.
      self.server.requests.append(
        Request(*about, len(self.body), sent, time.time(), kind)
      )
    if kind not in ('reset', 'lost'):
      self._send(answer, sent)
    if kind in ('reset', 'lost', 'cut'):
      self._hang_up()

  # Names that http.server looks for.
  do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815

  def _read_body(self) -> bytes:
    if self.headers.get('Transfer-Encoding', '').lower() != 'chunked':
      return self.rfile.read(int(self.headers.get('Content-Length') or 0))
    parts = []
    while size := int(self.rfile.readline().split(b';')[0], 16):
      parts.append(self.rfile.read(size))
      self.rfile.readline()
    while self.rfile.readline().strip():  # Trailers.
      pass
    return b''.join(parts)

  def _send(self, answer: Answer, size: int | None = None) -> None:
    """Writes an answer, and the first `size` bytes of its body."""
    self.send_response(answer.status)
    for key, value in answer.headers.items():
      self.send_header(key, value)
    if answer.status not in (204, 304):
      self.send_header('Content-Length', str(len(answer.body)))
    self.end_headers()
    self.wfile.write(answer.body[:size])
    self.wfile.flush()

  def _hang_up(self) -> None:
    self.close_connection = True
    with contextlib.suppress(OSError):
      self.connection.shutdown(socket.SHUT_RDWR)

  def _meet(self) -> Fault | None:
    """Returns the first fault that this request meets."""
    with self.server.lock:
      for x in self.server.faults:
        fits = x.what in ('', self.what) and re.search(x.match, self.name)
        if fits and x.count > 0 and self.server.random.random() < x.share:
          x.count -= 1
          return x
    return None

  def _check_permission(self) -> None:
    reads = self.what in ('list', 'read', 'stat', 'bucket')
    if (self.bucket, 'read' if reads else 'write') in self.server.forbidden:
      raise refuse(403, f'forbidden: nobody may not {self.what} here.')

  def _route(self, path: str):
    """Returns what answers the path, and names the request."""

    def named(what, found):
      self.what = what
      self.bucket, self.name = map(urllib.parse.unquote, (*found, '', '')[:2])

    if found := _COPY.fullmatch(path):
      named('copy', found.groups()[:2])
      to = [urllib.parse.unquote(x) for x in found.groups()[3:]]
      return lambda: self._copy(found[3], *to)
    if found := _UPLOAD.fullmatch(path):
      named('write', found.groups())
      self.name = self.query.get('name', '')
      kind = self.query.get('uploadType', '')
      if 'upload_id' in self.query:
        return self._continue_upload
      self.what = 'begin' if kind == 'resumable' else 'write'
      metadata, data, content_type = self._read_upload(kind)
      self.name = self.name or metadata.get('name', '')
      if kind == 'resumable':
        return lambda: self._begin_upload(metadata)
      return lambda: self._write(data, content_type, metadata)
    if found := _OBJECTS.fullmatch(path):
      named('list', found.groups())
      self.name = self.query.get('prefix', '')
      return self._list
    if found := _OBJECT.fullmatch(path) or _PLAIN.fullmatch(path):
      if found.re is _PLAIN and path.startswith('/storage/'):
        found = _BUCKET.fullmatch(path)
        named('bucket', found.groups() if found else ())
        return self._bucket
      whole = found.re is _PLAIN or self.query.get('alt') == 'media'
      match self.command:
        case 'DELETE':
          named('delete', found.groups())
          return self._delete
        case 'PUT':
          named('write', found.groups())
          return lambda: self._write(self.body, '', {})
        case _:
          named('read' if whole else 'stat', found.groups())
          return self._read if whole else self._stat
    return lambda: refuse(404, f'notFound: {path}')

  def _object(self) -> Object:
    """Returns the object asked for, after its preconditions."""
    found = self.server.bucket(self.bucket).get(self.name)
    generation = self.query.get('generation')
    if found and generation and str(found.generation) != generation:
      found = None
    if not found:
      if int(self.query.get('ifGenerationMatch', 0)):
        raise refuse(412, 'conditionNotMet: no such object')
      raise refuse(404, f'notFound: No such object: {self.bucket}/{self.name}')
    self._check_conditions(found)
    return found

  def _check_conditions(self, found: Object | None) -> None:
    generation = found.generation if found else 0
    # Nothing here changes metadata alone.
    metageneration = 1 if found else 0
    reads = self.command in ('GET', 'HEAD')
    for key, value, wanted in (
      ('ifGenerationMatch', generation, True),
      ('ifGenerationNotMatch', generation, False),
      ('ifMetagenerationMatch', metageneration, True),
      ('ifMetagenerationNotMatch', metageneration, False),
    ):
      given = self.query.get(key)
      if given is None:
        # The XML API's way.
        header = key.removeprefix('if').replace('Match', '-match').lower()
        given = self.headers.get(f'x-goog-if-{header}')
      if given is not None and (int(given) == value) != wanted:
        if reads and not wanted:
          raise Answer(304)
        raise refuse(412, f'conditionNotMet: {key}={given}')

  def _describe(self, bucket: str, name: str, found: Object) -> dict:
    return {
      'kind': 'storage#object',
      'id': f'{bucket}/{name}/{found.generation}',
      'name': name,
      'bucket': bucket,
      'generation': str(found.generation),
      'metageneration': '1',
      'contentType': found.content_type,
      'storageClass': 'STANDARD',
      'size': str(len(found.data)),
      'etag': f'e{found.generation}',
      'timeCreated': found.updated,
      'updated': found.updated,
      'metadata': dict(found.metadata),
      **found.sums,
    }

  def _stat(self) -> Answer:
    with self.server.lock:
      found = self._object()
    return Answer(200, self._describe(self.bucket, self.name, found))

  def _read(self) -> Answer:
    with self.server.lock:
      found = self._object()
    data, size = found.data, len(found.data)
    sums = found.sums
    headers = {
      'Content-Type': found.content_type,
      'ETag': f'"e{found.generation}"',
      'Accept-Ranges': 'bytes',
      'X-Goog-Generation': str(found.generation),
      'X-Goog-Metageneration': '1',
      'X-Goog-Stored-Content-Length': str(size),
      'X-Goog-Stored-Content-Encoding': 'identity',
      'X-Goog-Hash': f'crc32c={sums["crc32c"]},md5={sums["md5Hash"]}',
    }
    given = re.fullmatch(
      r'bytes=(\d*)-(\d*)', self.headers.get('Range', '').replace(' ', '')
    )
    if not given or given[0] == 'bytes=-':
      return Answer(200, data, **headers)
    if given[1]:
      start = int(given[1])
      end = min(int(given[2] or size), size - 1) + 1
    else:
      start, end = max(size - int(given[2]), 0), size
    if start >= size:
      headers = {'Content-Range': f'bytes */{size}'}
      return Answer(416, b'The range is not there.', **headers)
    headers['Content-Range'] = f'bytes {start}-{end - 1}/{size}'
    return Answer(206, data[start:end], **headers)

  def _list(self) -> Answer:
    prefix = self.query.get('prefix', '')
    delimiter = self.query.get('delimiter')
    after = self.query.get('pageToken', '')
    most = min(int(self.query.get('maxResults') or _PAGE), _PAGE)
    first, end = self.query.get('startOffset', ''), self.query.get('endOffset')
    with self.server.lock:
      objects = dict(self.server.bucket(self.bucket))
    items, prefixes, last, more = [], [], '', False
    for name in sorted(objects):
      if not name.startswith(prefix) or name < first or (end and name >= end):
        continue
      shown, rest = name, name[len(prefix) :]
      if is_prefix := bool(delimiter and delimiter in rest):
        shown = prefix + rest.partition(delimiter)[0] + delimiter
      if shown <= after or shown == last:
        continue
      if len(items) + len(prefixes) == most:
        more = True
        break
      last = shown
      if is_prefix:
        prefixes.append(shown)
      else:
        items.append(self._describe(self.bucket, name, objects[name]))
    answer = {'kind': 'storage#objects', 'items': items, 'prefixes': prefixes}
    return Answer(200, answer | ({'nextPageToken': last} if more else {}))

  def _bucket(self) -> Answer:
    if self.command != 'GET' or not self.bucket:
      return refuse(404, 'notFound: buckets come from the command line.')
    self.server.bucket(self.bucket)
    about = {'kind': 'storage#bucket', 'name': self.bucket, 'location': 'US'}
    return Answer(200, about | {'id': self.bucket, 'storageClass': 'STANDARD'})

  def _delete(self) -> Answer:
    with self.server.lock:
      self._object()
      self.server.delete(self.bucket, self.name)
    return Answer(204)

  def _copy(self, how: str, bucket: str, name: str) -> Answer:
    with self.server.lock:
      source = self.server.bucket(self.bucket).get(self.name)
      if not source:
        raise refuse(404, f'notFound: {self.bucket}/{self.name}')
      self._check_conditions(self.server.bucket(bucket).get(name))
      new = self.server.put(bucket, name, source.data, source.content_type)
    about = self._describe(bucket, name, new)
    if how == 'copyTo':
      return Answer(200, about)
    size = about['size']
    done = {'done': True, 'objectSize': size, 'totalBytesRewritten': size}
    kind = 'storage#rewriteResponse'
    return Answer(200, {'kind': kind, 'resource': about} | done)

  def _read_upload(self, kind: str) -> tuple[dict, bytes, str]:
    """Returns the metadata, the bytes and their type."""
    content_type = self.headers.get('Content-Type', '')
    if kind == 'resumable':
      return json.loads(self.body or b'{}'), b'', ''
    if kind != 'multipart':
      return {}, self.body, content_type
    boundary = re.search('boundary="?([^";]+)', content_type)[1].encode()
    # Some end their lines with \n alone; what the data ends with stays then.
    parts = re.match(
      rb'\s*--%b(\r?\n)(.*?)\1\1(.*?)\1--%b\1(.*?)\1\1(.*)\1--%b--'
      % ((re.escape(boundary),) * 3),
      self.body,
      re.DOTALL,
    )
    inner = re.search(rb'(?i)content-type: *([^\r\n]+)', parts[4])
    return json.loads(parts[3]), parts[5], inner[1].decode() if inner else ''

  def _write(self, data: bytes, content_type: str, metadata: dict) -> Answer:
    """Writes the object where its preconditions hold and its sums are right."""
    with self.server.lock:
      self._check_conditions(self.server.bucket(self.bucket).get(self.name))
      new = Object(data, 0, '', '', {})
      for key, value in new.sums.items():
        if metadata.get(key, value) != value:
          raise refuse(400, f'{key}: the bytes are others.')
      kind = metadata.get('contentType') or content_type
      about = metadata.get('metadata')
      new = self.server.put(
        self.bucket, self.name, data, kind or 'application/octet-stream', about
      )
    return Answer(200, self._describe(self.bucket, self.name, new))

  def _begin_upload(self, metadata: dict) -> Answer:
    with self.server.lock:
      self._check_conditions(self.server.bucket(self.bucket).get(self.name))
      number = f'upload{len(self.server.uploads)}'
      kind = self.headers.get('X-Upload-Content-Type', '')
      self.server.uploads[number] = {
        'name': self.name,
        'query': self.query,
        'data': bytearray(),
        'metadata': {'contentType': kind} | metadata,
        'answer': None,
      }
    location = f'{self.server.url}/upload/storage/v1/b/{self.bucket}/o'
    location += f'?uploadType=resumable&upload_id={number}'
    return Answer(200, b'', Location=location)

  def _continue_upload(self) -> Answer:
    """Takes a chunk; asked without one, tells how far the upload is."""
    number = self.query['upload_id']
    with self.server.lock:
      upload = self.server.uploads.get(number)
      if not upload:
        return refuse(404, 'notFound: no such upload')
      if self.command == 'DELETE':
        del self.server.uploads[number]
        return Answer(499)
      self.name, data = upload['name'], upload['data']
      if upload['answer']:
        return upload['answer']
      given = re.fullmatch(
        r'bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)',
        self.headers.get('Content-Range', f'bytes 0-0/{len(self.body)}'),
      )
      start, total = int(given[1] or 0), given[3]
      if given[1] and start > len(data):
        return refuse(400, f'{start} is not where the upload is: {len(data)}')
      if given[1] and total != '*' and start + len(self.body) > int(total):
        return refuse(400, f'{given[0]}: more than there is')
      if given[1]:
        data += self.body[len(data) - start :]
      if total != '*' and len(data) == int(total):
        self.query = upload['query']
        upload['answer'] = self._write(bytes(data), '', upload['metadata'])
        return upload['answer']
      del data[len(data) - len(data) % _GRANULE :]
      kept = {'Range': f'bytes=0-{len(data) - 1}'} if data else {}
      return Answer(308, b'', **kept)

  def _control(self, path: str) -> Answer:
    """Does for another process what a test does through the server.

    POST /control/faults with the fields of a Fault in JSON, or DELETE; GET or
    DELETE /control/requests; POST /control/forbidden with {"bucket": ...}.
    """
    server, given = self.server, json.loads(self.body or b'{}')
    match self.command, path.removeprefix(CONTROL):
      case 'POST', '/faults':
        server.order(**given)
      case 'POST', '/forbidden':
        server.forbid(**given)
      case 'DELETE', '/faults':
        server.heal()
      case 'GET', '/requests':
        return Answer(200, [x._asdict() for x in server.requests])
      case 'DELETE', '/requests':
        return Answer(200, [x._asdict() for x in server.clear()])
      case _:
        return refuse(404, f'notFound: {path}')
    return Answer(200, {})


def main() -> None:
  parser = argparse.ArgumentParser(description='A fake Google Cloud Storage.')
  parser.add_argument('--port', type=int, default=9000)
  parser.add_argument('--bucket', action='append', help='again for another one')
  parser.add_argument('--folder', type=pathlib.Path, help='where objects stay')
  given = parser.parse_args()
  buckets = tuple(given.bucket or ('test-bucket',))
  with serve(buckets, given.port, given.folder) as server:
    for key, value in server.environ.items():
      print(f'export {key}={value}', flush=True)
    with contextlib.suppress(KeyboardInterrupt):
      threading.Event().wait()


if __name__ == '__main__':
  main()
