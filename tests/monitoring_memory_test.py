from jaxprog.monitoring import memory


def test_memory_is_asked_for_at_most_once_a_second(monkeypatch):
  sizes, now = iter(range(1, 9)), [0.0]
  monkeypatch.setattr(
    memory, 'in_use', lambda: memory.Memory('device_memory', next(sizes))
  )
  sampler = memory.Sampler(clock=lambda: now[0])
  seen = []
  for now[0] in (0.0, 0.4, 0.99, 1.0, 1.5, 2.1):
    seen.append(sampler.in_use().bytes)
  assert seen == [1, 1, 1, 2, 2, 3]


def test_memory_is_that_of_this_process_or_its_devices():
  used = memory.Sampler().in_use()
  assert used.kind in ('device_memory', 'process_memory')
  assert used.bytes > 1e6
