import os
import signal

import pytest

from jaxprog.training import signals


def test_the_first_signal_is_remembered():
  before = signal.getsignal(signal.SIGTERM)
  with signals.StopRequest() as stop:
    assert stop.signum is None
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signum == signal.SIGTERM
  assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
  'handler', [signal.default_int_handler, signal.SIG_IGN]
)
def test_the_second_one_acts_at_once(handler):
  before = signal.signal(signal.SIGINT, handler)
  try:
    with signals.StopRequest() as stop:
      os.kill(os.getpid(), signal.SIGINT)
      assert stop.signum == signal.SIGINT
      with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == handler
  finally:
    signal.signal(signal.SIGINT, before)
