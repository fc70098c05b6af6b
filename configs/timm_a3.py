"""ImageNet-1k in 100 epochs of 160 pixels: A3 of "ResNet strikes back".

78.1% top-1 with ResNet-50 at 224 pixels (arXiv:2110.00476, table 2); theirs,
nothing of this was run here. What it shares with A1 and A2 is in timm_a1.py and
timm_a2.py, with its sources.
"""

from ml_collections import config_dict

from jaxprog import start_from


def get_config() -> config_dict.ConfigDict:
  """Returns one stage."""
  config = start_from('timm_a2')
  (stage,) = config.stages
  stage.update(
    {
      'description': 'ResNet-50, A3 of arXiv:2110.00476, 100 epochs.',
      # Table 2: top-1, train res (the test res stays 224), epochs, LR.
      'published_top1': 0.781,
      'image_size': 160,
      'num_epochs': 100,
      'learning_rate': 8e-3,
      'end_factor': 1e-6 / 8e-3,
      # Table 2: Rand Augment 6 / 0.5; neither repeated aug nor stoch. depth.
      'rand_augment_magnitude': 18,
      'augment_repeats': 1,
      'drop_path': 0.0,
    }
  )
  return config
