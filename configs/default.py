"""A config without stages: every field of jaxprog/fields.py at its default.

The other configs start from it and override: `start_from('default')`. A stage
is a plain dict: what it leaves out comes from `stage_defaults`. docs/fields.md
lists the fields.
"""

from ml_collections import config_dict

from jaxprog import config


def get_config() -> config_dict.ConfigDict:
  """Returns a config without stages: all fields, all defaults."""
  return config.defaults()
