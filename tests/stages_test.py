import pytest
import tiny_config

from jaxprog import errors, stages


def create_stages(**changes):
  config = tiny_config.get_config()
  config.stages[0].update(changes)
  return stages.create_stages(config)


COSINE = {'schedule': 'cosine_warmup'}
PLATEAU = {'schedule': 'plateau', 'plateau_patience': 0}


def phase(from_epoch, batch_size):
  return {'from_epoch': from_epoch, 'batch_size': batch_size}


def message(**changes):
  with pytest.raises(errors.UserError) as caught:
    create_stages(**changes)
  lines = str(caught.value).split('\n')
  assert len(lines) <= 3
  return str(caught.value)


def test_plain_dicts_are_completed_from_the_defaults():
  first = create_stages()[0]
  assert first.batch_size == 48
  assert first.b2 == 0.999
  assert first.classes == ('1', '3', '5')


def test_ints_become_floats_and_lists_become_tuples():
  first = create_stages(num_epochs=3, classes=['1'])[0]
  assert isinstance(first.num_epochs, float)
  assert first.classes == ('1',)


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    ({'num_epoch': 3}, "Did you mean 'num_epochs'?"),
    ({'optimizer': 'adamW'}, "Did you mean 'adamw'?"),
    ({'schedule': 'cosin'}, "Did you mean 'cosine'?"),
    ({'dataset': 'imagenete'}, "Did you mean 'imagenette'?"),
    ({'dataset': 'folder:'}, 'Unknown dataset'),
    ({'dataset': 'folder:PATH'}, None),
    ({'learning_rate': float('nan')}, 'finite'),
    ({'learning_rate': -1.0}, 'above 0'),
    ({'learning_rate': '0.1'}, 'must be a number'),
    ({'num_epochs': 0}, 'above 0'),
    ({'batch_size': 0.5}, 'whole number'),
    ({'batch_size': True}, 'whole number'),
    ({'flip': 1}, 'True or False'),
    ({'classes': '123'}, 'tuple of strings'),
    ({'label_smoothing': 1.5}, 'below 1'),
    ({'bce_target_threshold': 0.2}, 'no threshold of targets'),
    (
      {'loss': 'bce', 'bce_target_threshold': 0.2, 'label_smoothing': 0.1},
      'none is smooth',
    ),
    ({'drop_path': 1.0}, 'below 1'),
    ({'augment_repeats': 17}, 'less than three images'),
    ({'ema_warmup_power': 0.7}, 'ema_decay is 0'),
    ({'name': 'a/b'}, 'directory'),
    ({'name': 'ten'}, "Two stages are named 'ten'"),
    ({'schedule': 'exponential_warmup'}, 'end_factor'),
    ({'warmup_epochs': 1.0}, 'warmup_fraction'),
    ({**COSINE, 'warmup_epochs': 0.5, 'warmup_steps': 3}, 'both set'),
    ({'schedule': 'step'}, 'need each other'),
    ({'milestones': (1, 2)}, 'need each other'),
    ({'schedule': 'step', 'milestones': (2, 1)}, 'must rise'),
    ({'schedule': 'step', 'milestones': 30}, 'must be a tuple of numbers'),
    ({'schedule': 'linear', 'restart_epochs': 1.0}, 'no warm restarts'),
    ({'schedule': 'plateau', 'plateau_patience': 2}, 'has 2'),
    ({**PLATEAU, 'plateau_metric': 'val_los'}, "mean 'val_loss'"),
    ({'optimizer': 'rmsprop_8bit'}, "mean 'rmsprop'"),
    ({'optimizer': 'adamw', 'nesterov': True}, 'no Nesterov'),
    ({'optimizer': 'adamw', 'scale_learning_rate': True}, 'about SGD'),
    ({'gradient_clipping': 1.0, 'adaptive_clipping': 0.1}, 'both set'),
    ({'class_weighting': 0.6, 'balanced_sampling': 0.5}, 'favour rare'),
    ({'class_weighting': 0.5, 'balanced_sampling': 0.5}, None),
    ({'weight_decay_kind': 'couple'}, "mean 'coupled'"),
    ({'ema_decay': 1.0}, 'below 1'),
    ({'micro_batch_size': 7}, 'does not divide'),
    ({'phases': ({'from_epoch': 1},)}, 'A phase is not'),
    ({'phases': (phase(2, 96), phase(1, 192))}, 'follow one another'),
    ({'phases': (phase(9, 96),)}, 'after the last of 2'),
    ({'phases': (phase(1, 96),)}, None),
    ({'phases': ({'from_epoch': 1, 'flip': False},)}, 'field of a phase'),
    ({'phases': ({'from_epoch': 1, 'image_size': 2},)}, 'at least 8'),
    ({'phases': ({'from_epoch': 1, 'image_size': 16},)}, None),
    ({'storage': 'raw:256'}, None),
    ({'storage': 'jpeg:512:95'}, None),
    ({'storage': 'jpeg'}, 'Unknown storage'),
    ({'storage': 'jpeg:512:101'}, 'Unknown storage'),
    ({'storage': 'raw:2'}, 'Unknown storage'),
    ({'storage': 'raw:7'}, 'Unknown storage'),
    ({'storage': 'raw:08'}, None),
    ({'storage': 'raw:64:90'}, 'Unknown storage'),
    ({'eval_split': 'holdout:2%'}, None),
    ({'eval_split': 'holdout:0%'}, 'Unknown eval_split'),
    ({'eval_split': 'holdout:0.5%'}, None),
    ({'eval_split': 'holdout:100%'}, 'Unknown eval_split'),
    ({'eval_split': 'holdout:2'}, "mean 'holdout:2%'"),
    ({'eval_split': 'test'}, 'Unknown eval_split'),
    ({'auto_augment': 'randaugment'}, "mean 'rand_augment'"),
    ({'eval_interpolation': 'cubic'}, "mean 'bicubic'"),
    ({'flip': False, 'alternating_flip': True}, 'a kind of flip'),
    ({'erasing_min_area': 0.5}, 'above erasing_max_area'),
    ({'hue': 0.6}, 'at most 0.5'),
    ({'schedule': 'step', 'milestones': (1, 2.5)}, None),
    ({'distill_from': 'stage:three'}, 'does not teach itself'),
    ({'distill_from': 'stage:two:all'}, "no teacher: 'stage:two:all'"),
    ({'distill_from': 'a.pth'}, 'is a pickle'),
    ({'distill_from': 'stage:two', 'distill_weight': 0}, 'nothing is taught'),
    ({'distill_from': 'stage:two', 'distill_epochs': 3}, 'past the last'),
    ({'distill_from': 'stage:two:ema', 'distill_epochs': 2}, None),
    ({'low_frequency_size': 16}, 'above image_size 8'),
    ({'low_frequency_size': 7}, '0 or at least 8'),
  ],
)
def test_mistakes_in_a_stage(changes, expected):
  if expected is None:
    create_stages(**changes)
  else:
    assert expected in message(**changes)


def test_mistakes_name_the_stage_they_are_in():
  assert "config.stages[0] ('three')" in message(momentum=2.0)


@pytest.mark.parametrize(
  ('field', 'value', 'expected'),
  [
    ('model', 'resnet51', "Did you mean 'resnet50'?"),
    ('dtype', 'float16', 'bfloat16'),
    ('platform', 'cuda', 'gpu'),
    ('stem_kernel', 5, '3, 7'),
    ('num_filters', 0, 'at least 1'),
    ('std_rgb', (0.2, 0.2, 0.0), 'above 0'),
    ('stages', [], 'no stages'),
    ('stages', ['imagenette'], 'must be a dict'),
  ],
)
def test_mistakes_outside_the_stages(field, value, expected):
  config = tiny_config.get_config()
  config[field] = value
  with pytest.raises(errors.UserError, match=expected):
    stages.create_stages(config)


def test_only_decides_the_order_and_skip_leaves_out():
  found = create_stages()

  def names(**kwargs):
    return [stage.name for stage in stages.select(found, **kwargs)]

  assert names() == ['three', 'ten', 'ten_again']
  assert names(only=['ten_again', 'three']) == ['ten_again', 'three']
  assert names(skip=['ten']) == ['three', 'ten_again']
  assert names(only=['ten', 'three'], skip=['ten']) == ['three']
  with pytest.raises(errors.UserError, match="Did you mean 'three'"):
    names(only=['tree'])
  with pytest.raises(errors.UserError, match='leave no stage'):
    names(only=['ten'], skip=['ten'])


def test_a_batch_must_divide_among_devices():
  found = create_stages()
  stages.check_devices(found, 8)
  with pytest.raises(errors.UserError, match='45 or 50'):
    stages.check_devices(found, 5)
  with pytest.raises(errors.UserError, match='Set it to 64'):
    stages.check_devices(found, 64)
  grows = create_stages(phases=[phase(1, 100)])
  with pytest.raises(errors.UserError, match='batch_size 100'):
    stages.check_devices(grows, 8)
  parts = create_stages(micro_batch_size=12)
  with pytest.raises(errors.UserError, match='micro_batch_size 12'):
    stages.check_devices(parts, 8)


def test_the_rate_grows_with_the_batch_if_asked():
  sgd = {'optimizer': 'sgd_momentum', 'learning_rate': 0.1, 'batch_size': 512}
  assert create_stages(**sgd)[0].peak_learning_rate == 0.1
  scaled = create_stages(**sgd, scale_learning_rate=True)[0]
  assert scaled.peak_learning_rate == 0.2


def test_a_stage_changes_from_phase_to_phase():
  stage = create_stages(
    num_epochs=9.0,
    image_size=16,
    phases=(
      {'from_epoch': 2, 'image_size': 24, 'batch_size': 96},
      {'from_epoch': 5, 'mixup_alpha': 0.2},
    ),
  )[0]
  found = [
    (first, part.image_size, part.batch_size, part.mixup_alpha)
    for first, part in stage.parts
  ]
  assert found == [(0, 16, 48, 0), (2, 24, 96, 0), (5, 24, 96, 0.2)]
  assert stage.eval_size == 24
  assert stage.holdout_part == 0
  assert create_stages(eval_split='holdout:2.5%')[0].holdout_part == 0.025
  assert create_stages(storage='jpeg:512')[0].stored == ('jpeg', 512, 90)
  assert create_stages(storage='jpeg:512:0')[0].stored == ('jpeg', 512, 0)
  assert create_stages(storage='raw')[0].stored == ('raw', 0, 0)
  assert create_stages(storage='raw:64')[0].stored == ('raw', 64, 0)
