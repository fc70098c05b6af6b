"""ImageNet-1k on a short budget: the recipe of ffcv-imagenet, one stage.

`--config=fast:16` trains ResNet-50 for 16 epochs, `:resnet18-16`
ResNet-18; 24, 32, 40, 56 and 88 epochs are published too. On fewer chips add
`--config.stages[0].micro_batch_size=512`, or take a smaller batch_size: the
rate follows it.

The README of libffcv/ffcv-imagenet gives, for these epochs, 73.8, 75.6, 76.6,
77.2, 78.0 and 78.4% top-1 (ResNet-18: 66.9, 68.8, 70.0, 70.6, 71.3, 72.4%),
averaged over an image and its mirror image at 256 pixels. These figures are
theirs; nothing of this was run here.

In what it differs from theirs is below, and `--mode=check` says it.
"""

from ml_collections import config_dict

from jaxprog import start_from

# Epochs: from where to where the image size rises from 160 to 192 pixels, as
# start_ramp and end_ramp of their YAML files.
RAMPS = {
  16: (11, 13),
  24: (17, 20),
  32: (23, 27),
  40: (29, 34),
  56: (41, 48),
  88: (65, 76),
}
# Batch size over all chips, the peak rate for it, and weight decay.
RECIPES = {
  'resnet18': (1024, 0.5, 5e-5),
  'resnet50': (4096, 1.7, 1e-4),
}
# Of their README, by epochs as above.
PUBLISHED = {
  'resnet18': (0.669, 0.688, 0.700, 0.706, 0.713, 0.724),
  'resnet50': (0.738, 0.756, 0.766, 0.772, 0.780, 0.784),
}
DIFFERS = (
  'BatchNorm sees the global batch, theirs the images of one GPU',
  'the rate rises from 0, theirs from 1e-4 of the peak',
  'kernels alone decay; theirs spares norms by name and so still decays those '
  "of the shortcuts, and the classifier's bias",
  'blocks start as their shortcut, and kernels have other initial weights',
  'bfloat16 (float32 on CPU), theirs float16 with a scaled loss',
  'stored images have 512 pixels on the shorter side, theirs 500 on the longer '
  'one and half of them are kept decoded',
)


def get_config(budget: str = '16') -> config_dict.ConfigDict:
  """Returns one stage; `budget` is EPOCHS or MODEL-EPOCHS.

  Stages of another config stand in front of it with
  `config.stages = [*other.stages[:3], *config.stages]`, `other` being what
  `jaxprog.load_config` returns: complete, so that it keeps its own defaults.

  Raises:
    ValueError: if no such recipe is published.
  """
  model, _, text = budget.rpartition('-')
  model = model or 'resnet50'
  if model not in RECIPES or text not in map(str, RAMPS):
    raise ValueError(
      f'{budget!r} is none of {", ".join(map(str, RAMPS))} epochs, nor '
      f'{" or ".join(RECIPES)} and a hyphen before them.'
    )
  num_epochs = int(text)
  batch_size, learning_rate, weight_decay = RECIPES[model]
  start, end = RAMPS[num_epochs]
  published = dict(zip(RAMPS, PUBLISHED[model], strict=True))

  config = start_from('default')
  config.model = model
  config.blur_pool = True
  config.stages = [
    {
      'name': 'imagenet',
      'description': f'ffcv-imagenet, {num_epochs} epochs.',
      'dataset': 'imagenet2012',
      'num_classes': 1000,
      'published_top1': published[num_epochs],
      'differs': DIFFERS,
      # README, dataset setup.
      'storage': 'jpeg:512',
      # resolution: min_res, max_res. Theirs rounds to the nearest 32 pixels:
      # two shapes, half-way.
      'image_size': 160,
      'phases': ({'from_epoch': -(-(start + end) // 2), 'image_size': 192},),
      # validation: resolution; DEFAULT_CROP_RATIO of train_imagenet.py.
      'eval_image_size': 256,
      'eval_crop': 224 / 256,
      'eval_flip': True,
      # training: epochs, batch_size of each of 8 GPUs (ResNet-18: of one),
      # momentum, weight_decay, label_smoothing. lr: lr, for that batch.
      'num_epochs': num_epochs,
      'batch_size': batch_size,
      'learning_rate': learning_rate,
      'scale_learning_rate': True,
      'base_batch_size': batch_size,
      'optimizer': 'sgd_momentum',
      'momentum': 0.9,
      'weight_decay': weight_decay,
      'label_smoothing': 0.1,
      # lr: lr_schedule_type cyclic, which is linear, lr_peak_epoch.
      'schedule': 'linear',
      'warmup_epochs': 2,
    }
  ]
  return config
