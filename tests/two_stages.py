"""Two trained stages that several files of tests look at."""

import fcntl
import os
import shutil

import jaxprog
from tests import tiny_config


def get_config(data_dir='data'):
  config = tiny_config.get_config(data_dir)
  config.stages = config.stages[:2]
  three, ten = config.stages
  three['eval_split'] = 'holdout:30%'
  ten['ema_decay'] = 0.9
  return config


def copy(factory, data_dir):
  """Returns a workdir of its own, trained by whichever worker asks first."""
  shared = factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    shared = shared.parent
  with open(shared / 'two_stages.lock', 'a') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not os.path.getsize(lock.name):
      jaxprog.train(get_config(data_dir), shared / 'two_stages')
      lock.write('trained')
  return shutil.copytree(shared / 'two_stages', factory.mktemp('two') / 'run')
