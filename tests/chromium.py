"""Opens a page in headless Chromium, driven over its DevTools pipe."""

import base64
import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time

PATH = shutil.which('chromium') or shutil.which('chromium-browser')
_SECONDS = 60.0
# Becomes the browser, with the two given descriptors as 3 and 4.
_CONNECT = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
  """A headless Chromium without a network; `events` is what it has told."""

  def __init__(self, profile):
    # The browser reads commands from descriptor 3 and answers on 4.
    commands, self._to = os.pipe()
    self._from, answers = os.pipe()
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (commands, answers)]

    self._process = subprocess.Popen(
      [
        sys.executable,
        '-c',
        _CONNECT,
        *map(str, high),
        PATH,
        '--headless=new',
        '--no-sandbox',
        '--disable-gpu',
        '--disable-dev-shm-usage',
        '--no-first-run',
        '--host-resolver-rules=MAP * ~NOTFOUND',
        f'--user-data-dir={profile}',
        '--remote-debugging-pipe',
        'about:blank',
      ],
      pass_fds=high,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    for fd in (commands, answers, *high):
      os.close(fd)
    self._ids, self._received, self._session = itertools.count(1), b'', None
    self.events = []
    target = self.call('Target.createTarget', url='about:blank')['targetId']
    self._session = self.call(
      'Target.attachToTarget', targetId=target, flatten=True
    )['sessionId']
    for domain in ('Page', 'Runtime', 'Log', 'Network'):
      self.call(f'{domain}.enable')

  def call(self, method, **params):
    """Returns the result of a DevTools method."""
    number = next(self._ids)
    message = {'id': number, 'method': method, 'params': params}
    if self._session:
      message['sessionId'] = self._session
    os.write(self._to, json.dumps(message).encode() + b'\0')
    while True:
      answer = self._receive()
      if answer.get('id') == number:
        assert 'error' not in answer, answer
        return answer['result']
      self.events.append(answer)

  def open(self, path, width, dark=False):
    """Loads a file at `width` CSS pixels and waits for its images."""
    self.call(
      'Emulation.setDeviceMetricsOverride',
      width=width,
      height=900,
      deviceScaleFactor=1,
      mobile=width < 500,
    )
    scheme = {'name': 'prefers-color-scheme', 'value': 'dark' if dark else ''}
    self.call('Emulation.setEmulatedMedia', features=[scheme])
    self.events.clear()
    self.call('Page.navigate', url=path.resolve().as_uri())
    self.wait_for_load()

  def wait_for_load(self):
    """Returns once a page is loaded, since the events were cleared."""
    while not self.events_of('Page.loadEventFired'):
      self.events.append(self._receive())

  def evaluate(self, expression):
    """Returns the value of a JavaScript expression in the page."""
    result = self.call(
      'Runtime.evaluate', expression=expression, returnByValue=True
    )
    assert 'exceptionDetails' not in result, result
    return result['result'].get('value')

  def events_of(self, *methods):
    """Returns the parameters of what it has told since `open`."""
    return [x['params'] for x in self.events if x.get('method') in methods]

  def screenshot(self, **clip):
    """Returns a PNG of the page, or of {x, y, width, height} of it."""
    box = {'clip': {**clip, 'scale': 1}} if clip else {}
    shot = self.call(
      'Page.captureScreenshot', captureBeyondViewport=True, **box
    )
    return base64.b64decode(shot['data'])

  def close(self):
    with contextlib.suppress(OSError):
      os.write(self._to, b'{"id":0,"method":"Browser.close"}\0')
    try:
      self._process.wait(10)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    os.close(self._to)
    os.close(self._from)

  def _receive(self):
    deadline = time.monotonic() + _SECONDS
    while b'\0' not in self._received:
      ready, _, _ = select.select(
        [self._from], [], [], max(0.0, deadline - time.monotonic())
      )
      part = os.read(self._from, 1 << 20) if ready else b''
      if not part:
        raise RuntimeError('Chromium does not answer.')
      self._received += part
    message, _, self._received = self._received.partition(b'\0')
    return json.loads(message)
