"""A config without stages: every field of jaxprog/fields.py at its default.

The other configs start from `get_config()` and override. A stage is a plain
dict: what it leaves out comes from `stage_defaults`. docs/fields.md lists the
fields.
"""

from ml_collections import config_dict

from jaxprog import fields


def get_config() -> config_dict.ConfigDict:
  """Returns a config without stages: all fields, all defaults."""
  config = fields.defaults(fields.CONFIG)
  config.stage_defaults = stage_defaults()
  config.stages = []
  return config


def stage_defaults() -> config_dict.ConfigDict:
  """Returns the fields of one stage."""
  return fields.defaults(fields.STAGE)
