"""TensorBoard's own server, asked over HTTP."""

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request


class Server:
  """TensorBoard, answering at a free port."""

  def __init__(self, logdir, python=sys.executable):
    with contextlib.closing(socket.socket()) as probe:
      probe.bind(('localhost', 0))
      port = probe.getsockname()[1]
    self._url = f'http://localhost:{port}/'
    self._process = subprocess.Popen(
      [
        *(str(python), '-m', 'tensorboard.main', '--logdir', str(logdir)),
        *('--port', str(port), '--load_fast=false', '--reload_interval=1'),
      ],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
    )

  def get(self, path, body=None, **query):
    url = self._url + path + '?' + urllib.parse.urlencode(query)
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
      url, data, {'Content-Type': 'application/json'}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
      return answer.headers['Content-Type'], answer.read()

  def get_json(self, path, body=None, **query):
    return json.loads(self.get(path, body, **query)[1])

  def get_session_group(self):
    """Returns the hparams and the metrics of the only run."""
    body = {
      'experimentName': '',
      'allowedStatuses': ['STATUS_UNKNOWN', 'STATUS_RUNNING', 'STATUS_SUCCESS'],
      'colParams': [],
      'includeMetrics': True,
      'startIndex': 0,
      'sliceSize': 10,
    }
    path = 'data/plugin/hparams/session_groups'
    (group,) = self.get_json(path, body)['sessionGroups']
    return group

  def get_picture(self, tag):
    """Returns a PNG, the only one of its tag."""
    (info,) = self.get_json(
      'data/plugin/images/images', run='train', tag=tag, sample=0
    )
    path = 'data/plugin/images/individualImage'
    kind, encoded = self.get(f'{path}?{info["query"]}&')
    assert kind == 'image/png'
    return encoded

  def wait_for_tag(self, tag):
    """Waits until all is read: `tag` is the last one that was written."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
      with contextlib.suppress(urllib.error.URLError, ConnectionError):
        if tag in self.get_json('data/plugin/images/tags').get('train', {}):
          return
      assert self._process.poll() is None, self._process.communicate()[0]
      time.sleep(0.2)
    raise AssertionError('TensorBoard does not show the run.')

  def close(self):
    self._process.terminate()
    self._process.communicate(timeout=20)
