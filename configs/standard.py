"""The standard strategy: the ladder of progressive.py without its extras.

The same four stages, data and budgets, with a cosine for AdamW early and
steps for SGD late; no clipping, no label smoothing, no mixed precision. It is
there to compare with; `--config=standard:resnet18` takes another network.
"""

from ml_collections import config_dict

from jaxprog import start_from

# Parts of a stage's epochs after which the rate falls to a tenth. The last is
# the usual 30, 60 and 80 of 90.
MILESTONES = {
  'imagenet_mini': (1 / 2, 3 / 4),
  'imagenet': (1 / 3, 2 / 3, 8 / 9),
}


def get_config(model: str = 'resnet50') -> config_dict.ConfigDict:
  """Returns the four stages, from 10 classes to 1000."""
  config = start_from(f'progressive:{model}')
  config.stage_defaults.mixed_precision = False
  config.stage_defaults.gradient_clipping = 0.0
  config.stage_defaults.label_smoothing = 0.0
  for stage in config.stages:
    stage['warmup_epochs'] = 0.0
    stage['end_factor'] = 0.0
    if stage['name'] in MILESTONES:
      stage['optimizer'] = 'sgd_momentum'
      stage['schedule'] = 'step'
      stage['milestones'] = tuple(
        part * stage['num_epochs'] for part in MILESTONES[stage['name']]
      )
    else:
      stage['optimizer'] = 'adamw'
      stage['schedule'] = 'cosine'
  return config
