"""Losses, held against timm's own on the same logits and targets."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny_config

from jaxprog import stages
from jaxprog.training import losses

N, CLASSES, SHARE = 8, 11, 0.7


def create(**fields):
  stage = stages.create_stages(tiny_config.get_config())[0]
  stage = dataclasses.replace(stage, **fields)
  loss_fn = losses.create_loss_fn(stage)
  return functools.partial(loss_fn, numbers=losses.read_numbers(stage, CLASSES))


def draw():
  """Returns logits (N, CLASSES) and labels (N,)."""
  rng = np.random.default_rng(0)
  logits = 4 * rng.normal(size=(N, CLASSES))
  return logits.astype(np.float32), rng.integers(0, CLASSES, N)


def mixed(labels):
  """Returns targets of examples mixed with those of the batch turned over."""
  targets = np.eye(CLASSES, dtype=np.float32)[labels]
  return SHARE * targets + (1 - SHARE) * targets[::-1]


def compare(loss_fn, logits, targets, peer, their_targets):
  """Asserts that both losses and their gradients are the same."""
  torch = pytest.importorskip('torch', reason=parity.REASON)
  theirs = torch.from_numpy(logits.copy()).requires_grad_()
  expected = peer(theirs, their_targets)
  expected.backward()

  def mean(logits):
    return jnp.mean(loss_fn(logits, targets))

  found, grads = jax.value_and_grad(mean)(logits)
  np.testing.assert_allclose(found, expected.item(), rtol=1e-5)
  np.testing.assert_allclose(grads, theirs.grad, rtol=1e-4, atol=1e-8)


# Recipes with one have no threshold, and the other way round.
@pytest.mark.parametrize(
  ('smoothing', 'threshold'), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.2), (0.0, 0.5)]
)
def test_binary_losses_of_mixed_targets_are_timms(smoothing, threshold):
  torch = pytest.importorskip('torch', reason=parity.REASON)
  timm_loss = parity.import_module('timm.loss')
  mixup = parity.import_module('timm.data.mixup')
  logits, labels = draw()
  loss_fn = create(
    loss='bce', label_smoothing=smoothing, bce_target_threshold=threshold
  )
  peer = timm_loss.BinaryCrossEntropy(smoothing, threshold or None)
  theirs = mixup.mixup_target(
    torch.from_numpy(labels), CLASSES, SHARE, smoothing
  )
  compare(loss_fn, logits, mixed(labels), peer, theirs)


@pytest.mark.parametrize(
  ('loss', 'peer'),
  [('bce', 'BinaryCrossEntropy'), ('softmax', 'LabelSmoothingCrossEntropy')],
)
def test_smoothed_labels_are_timms(loss, peer):
  torch = pytest.importorskip('torch', reason=parity.REASON)
  timm_loss = parity.import_module('timm.loss')
  logits, labels = draw()
  targets = np.eye(CLASSES, dtype=np.float32)[labels]
  peer = getattr(timm_loss, peer)(smoothing=0.1)
  loss_fn = create(loss=loss, label_smoothing=0.1)
  compare(loss_fn, logits, targets, peer, torch.from_numpy(labels))


def test_softmax_of_mixed_targets_is_timms():
  torch = pytest.importorskip('torch', reason=parity.REASON)
  timm_loss = parity.import_module('timm.loss')
  logits, labels = draw()
  targets = mixed(labels)
  peer = timm_loss.SoftTargetCrossEntropy()
  compare(create(), logits, targets, peer, torch.from_numpy(targets))


def test_binary_losses_of_extreme_logits_are_finite():
  logits = jnp.array([[-1e4, 1e4, 0.0]])
  targets = jnp.array([[1.0, 0.0, 0.5]])
  found = losses.binary_losses(logits, targets)
  np.testing.assert_allclose(found, [(2e4 + np.log(2)) / 3], rtol=1e-6)
