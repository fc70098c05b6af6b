"""What others do, to compare with, where they are installed."""

import importlib
from types import ModuleType

import pytest

REASON = 'make test PARITY=1 installs torch, torchvision, timm and TensorFlow'


def import_module(name: str) -> ModuleType:
  """Returns a module that imports torchvision; skips where there is none."""
  torch = pytest.importorskip('torch', reason=REASON)
  library = torch.library.Library('torchvision', 'FRAGMENT')
  for operator in ('nms', 'qnms'):
    # torchvision's only wheels on the index are for CUDA: without these two
    # names it fails beside a PyTorch for CPUs.
    if not hasattr(torch.ops.torchvision, operator):
      library.define(f'{operator}(Tensor a, Tensor b, float c) -> Tensor')
  pytest.importorskip(name.partition('.')[0], reason=REASON)
  return importlib.import_module(name)
