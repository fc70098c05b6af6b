"""What one of two processes does that only count, as training counts steps.

    python tests/pair.py PORT PROCESS_ID HOW

HOW: 'count' until a signal comes; 'fail' at 30 in process 0, 'finish' at 30.
"""

import sys
import time

from jaxprog import errors
from jaxprog.reliability import cluster, signals


def main(port, index, how):
  place = cluster.Place(f'localhost:{port}', 2, int(index))
  with (
    signals.StopRequest(owns_process=True) as stop,
    cluster.processes(place, how, 60),
    stop.deferred(),
  ):
    for step in range(1, 6000):
      # Neither waits for the other, as devices would make them.
      time.sleep(0.004 if index == '0' else 0.011)
      saved = stop.poll(save=step == 20 and index == '0')
      if saved:
        print('saved', step, flush=True)
      if step == 30:
        print('counting', flush=True)
      if step == 30 and how == 'fail' and index == '0':
        raise errors.UserError('A mistake.', 'here', 'Mend it.')
      if step == 30 and how == 'finish':
        return 0
      if stop.signum is not None:
        print('stopped', step, flush=True)
        raise errors.Stopped(stop.signum, saved=True)


if __name__ == '__main__':
  try:
    code = main(*sys.argv[1:])
  except errors.UserError as e:
    print(e, flush=True)
    code = 2
  except errors.Stopped as e:
    print(e, flush=True)
    code = e.exit_code
  if code:
    signals.leave(code)
