"""A ladder of three short stages that a test can afford."""

from jaxprog import start_from


def get_config(data_dir='data'):
  config = start_from('default')
  config.data_dir = str(data_dir)
  config.model = 'resnet10'
  config.num_filters = 4
  config.stem_kernel = 3
  config.checkpoint_every_minutes = 0.0
  config.tensorboard = False  # Where there is TensorFlow: 4 s of a core.
  stage = config.stage_defaults
  stage.dataset = 'digits'
  stage.image_size = 8
  stage.min_crop_area = 0.8
  stage.eval_crop = 1.0
  stage.flip = False
  stage.batch_size = 48
  stage.learning_rate = 0.01
  config.stages = [
    {
      'name': 'three',
      'classes': ('1', '3', '5'),
      'num_epochs': 2,
      'schedule': 'one_cycle',
    },
    {
      'name': 'ten',
      'num_epochs': 1.5,
      'schedule': 'cosine_warmup',
      'warmup_epochs': 0.5,
    },
    {
      'name': 'ten_again',
      'num_epochs': 1,
      'image_size': 16,
      'optimizer': 'sgd_momentum',
      'schedule': 'polynomial',
    },
  ]
  return config
