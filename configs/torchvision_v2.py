"""ImageNet-1k in 600 epochs: torchvision's recipe of its V2 weights.

80.858% top-1 with ResNet-50, which is the averaged weights' (ema_top1 here):
torchvision.models.ResNet50_Weights.IMAGENET1K_V2, with the arguments of
references/classification/train.py in pytorch/vision issue 3995, and "How to
Train State-Of-The-Art Models Using TorchVision's Latest Primitives" on
pytorch.org's blog. The figure is theirs; nothing of this was run here. In what
it differs from theirs is below, and `--mode=check` says it.
"""

from ml_collections import config_dict

from jaxprog import start_from

# ngpus, batch_size (of each), epochs, model_ema_steps, model_ema_decay.
BATCH_SIZE, EPOCHS, EMA_STEPS, EMA_DECAY = 8 * 128, 600, 32, 0.99998
# train.py averages every EMA_STEPS, and what it forgets then is so many times
# 1 - EMA_DECAY. Here each step forgets its part of that.
FORGOTTEN = (1 - EMA_DECAY) * BATCH_SIZE * EMA_STEPS / EPOCHS

DIFFERS = (
  'weights are averaged each step, theirs every 32; until the rate has risen '
  'theirs are the weights themselves',
  'BatchNorm sees the global batch, theirs the images of one GPU',
  'the rate changes each step, theirs each epoch; it rises from 0, theirs from '
  '1% of the peak',
  "kernels alone decay, of theirs the classifier's bias too",
  'operations of TrivialAugment take the nearest pixel, theirs interpolate',
  'what is erased is filled with noise, theirs with the mean colour',
  'an image is mixed with the one before it, theirs with another of its GPU',
  'blocks start as their shortcut, and kernels have other initial weights',
  'bfloat16 (float32 on CPU)',
)


def get_config() -> config_dict.ConfigDict:
  """Returns one stage."""
  config = start_from('default')
  config.model = 'resnet50'
  config.stages = [
    {
      'name': 'imagenet',
      'description': "ResNet-50, torchvision's V2 weights, 600 epochs.",
      'dataset': 'imagenet2012',
      'num_classes': 1000,
      'published_top1': 0.80858,  # Of IMAGENET1K_V2.
      'differs': DIFFERS,
      # train_crop_size, val_crop_size, val_resize_size, interpolation.
      'image_size': 176,
      'eval_image_size': 224,
      'eval_crop': 224 / 232,
      'crop_interpolation': 'bilinear',
      'eval_interpolation': 'bilinear',
      # presets.py: RandomResizedCrop and a flip, as torchvision has them.
      'min_crop_area': 0.08,
      'max_crop_aspect': 4 / 3,
      'flip': True,
      # auto_augment: ta_wide; random_erase, with RandomErasing's areas.
      'auto_augment': 'trivial_augment',
      'erasing_probability': 0.1,
      'erasing_min_area': 0.02,
      'erasing_max_area': 0.33,
      # mixup_alpha, cutmix_alpha, label_smoothing, ra_sampler with ra_reps.
      'mixup_alpha': 0.2,
      'cutmix_alpha': 1.0,
      'label_smoothing': 0.1,
      'augment_repeats': 4,
      # epochs; batch_size of each of 8 GPUs.
      'num_epochs': EPOCHS,
      'batch_size': BATCH_SIZE,
      # opt: sgd, lr, momentum, weight_decay (norm_weight_decay is 0).
      'optimizer': 'sgd_momentum',
      'learning_rate': 0.5,
      'momentum': 0.9,
      'weight_decay': 2e-5,
      # lr_scheduler: cosineannealinglr, to 0; lr_warmup_epochs.
      'schedule': 'cosine_warmup',
      'warmup_epochs': 5,
      'ema_decay': (1 - FORGOTTEN) ** (1 / EMA_STEPS),
    }
  ]
  return config
