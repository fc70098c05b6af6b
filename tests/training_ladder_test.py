"""What of a ladder is compiled before a stage trains, and what beside it."""

import types
from concurrent import futures

import jax
import pytest

from jaxprog import epochs
from jaxprog.reliability import checkpoints, watchdog
from jaxprog.training import ladder

STAGES = 'one', 'two', 'three'


@pytest.mark.parametrize(
  ('platform', 'begun'), [('cpu', STAGES[:2]), ('gpu', STAGES)]
)
def test_a_gpu_times_kernels_before_the_first_stage_trains(
  tmp_path, monkeypatch, platform, begun
):
  monkeypatch.setattr(jax, 'default_backend', lambda: platform)
  submitted = []

  class Compiler(futures.Executor):
    def submit(self, prepare, task):
      submitted.append(task.stage.name)
      future = futures.Future()
      future.set_result(prepare(task))
      return future

  for name in STAGES:  # What is done needs no compiler.
    folder = checkpoints.stage_directory(tmp_path, name)
    with checkpoints.Checkpoints(folder, print) as saved:
      saved.mark_done({})
  config = types.SimpleNamespace(compilation_cache_dir='', xla_flags='none')
  tasks = [
    types.SimpleNamespace(
      config=config,
      model='network',
      steps=epochs.Steps((), 10),
      stage=types.SimpleNamespace(name=name, optimizer='adamw'),
      train_steps={},
    )
    for name in STAGES
  ]
  run = types.SimpleNamespace(
    tasks=tuple(tasks),
    workdir=tmp_path,
    compiler=Compiler(),
    compilers=None,  # Here all wait for one compiler.
    dog=watchdog.Watchdog(0),
    waits={},
  )
  compiled = ladder._compile_ahead(run)
  assert next(compiled) is tasks[0]
  assert submitted == list(begun)  # And the first stage begins.
  assert list(compiled) == tasks[1:]
  assert submitted == list(STAGES)
