"""Are all processes of a run about to do the same?"""

import contextlib
import importlib.metadata
import pathlib
import time
from collections.abc import Mapping

import jax
from ml_collections import config_dict

from jaxprog import buckets, fields, files, stages, version
from jaxprog import config as config_lib
from jaxprog.data import jpeg
from jaxprog.data.records import Dataset
from jaxprog.reliability import lease, peers

# Seconds for a shared workdir to show what process 0 has written: NFS remembers
# for a while what was not there.
_VISIBLE_SECONDS = 20.0
# Fields in which hosts may differ: where data lies and what reads it.
_LOCAL = {'stage_defaults', *fields.names(fields.CONFIG, 'local')}


def check_alike(
  config: config_dict.ConfigDict, datasets: Mapping[str, Dataset]
) -> None:
  """Raises UserError in all processes unless all are about to do the same.

  Config, data, devices and code are compared, `datasets` by stage, in order.
  """
  if not peers.joined():
    return
  described = {'the stages': ', '.join(datasets), **_describe_config(config)}
  for name, dataset in datasets.items():
    described |= {
      f'{name}: {field}': text
      for field, text in _describe_data(dataset).items()
    }
  local = jax.local_devices()
  described |= {
    'the code of jaxprog': f'{version.VERSION} {_hash_code()}',
    'the version of jax': jax.__version__,
    'the version of jaxlib': importlib.metadata.version('jaxlib'),
    'the decoder': jpeg.version(),
    'the devices': f'{len(local)} x {local[0].device_kind}',
  }
  peers.compare('run', described)


def check_workdir(workdir: pathlib.Path, url: str = '') -> None:
  """Raises UserError in all processes unless `workdir` is the same to all.

  Process 0 has locked it, and its bucket `url` if there is one: all must see
  its name there.
  """
  if peers.joined():
    peers.wait_for_files('locked')
    owner = _describe_lease(url) if url else _describe_owner(workdir)
    peers.compare('workdir', {'the workdir': owner})


def _describe_config(config: config_dict.ConfigDict) -> dict[str, str]:
  """Returns each field that must be the same, 'STAGE.FIELD' for a stage's."""
  plain = config_lib.to_json(stages.complete(config))
  fields = {k: v for k, v in plain.items() if k not in _LOCAL}
  described: dict[str, str] = {}
  for stage in fields.pop('stages'):
    described |= {f'{stage["name"]}.{k}': repr(v) for k, v in stage.items()}
  return described | {f'config.{k}': repr(v) for k, v in fields.items()}


def _describe_data(dataset: Dataset) -> dict[str, str]:
  """Returns what decides the examples of a stage."""
  records = dataset.train
  return {
    'the number of classes': str(dataset.num_classes),
    'the number of images': f'{len(dataset.train)} + {len(dataset.selection)}',
    'the data': dataset.fingerprint[:16],
    'the training images': files.digest_parts(
      records.positions.tobytes(), records.labels.tobytes(), dataset.version
    )[:16],
  }


def _hash_code() -> str:
  root = pathlib.Path(__file__).parents[1]
  return files.digest_parts(*map(files.digest, sorted(root.rglob('*.py'))))[:16]


def _describe_lease(url: str) -> str:
  """Returns whose a bucket is."""
  owner = lease.read_newest(buckets.Bucket(url)) or {}
  return str(owner.get('token', 'not locked'))


def _describe_owner(workdir: pathlib.Path) -> str:
  """Returns who has locked a workdir; process 0 has, before all compare."""
  deadline = time.monotonic() + _VISIBLE_SECONDS
  while True:
    with contextlib.suppress(OSError):
      owner = (workdir / 'run.lock').read_bytes()
      if owner:
        return files.digest_parts(owner)[:16]
    if time.monotonic() > deadline:
      return 'not locked'
    time.sleep(0.2)
