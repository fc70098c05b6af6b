"""The last stage alone, from fresh weights: what a ladder has to beat."""

import dataclasses

from ml_collections import config_dict

from jaxprog import errors
from jaxprog import stages as stages_lib
from jaxprog.comparison.cells import Budget, Cell

# As long as it says itself; its learning rate serves the others too.
OWN_LENGTH = 'last_alone'
EQUAL: tuple[Budget, ...] = ('flops', 'images', 'seconds')


def create_controls(
  config: config_dict.ConfigDict, reference: Cell
) -> tuple[Cell, ...]:
  """Returns the reference's last stage alone, at four lengths.

  At its own, and at the cost of the reference's whole ladder in FLOPs, in
  images and in seconds. () if the config asks for none.

  Raises:
    UserError: if the ladder has one stage, which is alone anyway.
  """
  if not config.controls:
    return ()
  if len(config.base.stages) < 2:
    raise errors.UserError(
      'The last stage of a ladder of one is the ladder.',
      'config.controls',
      'Set controls to False, or give config.base a stage before.',
    )
  alone = Cell(
    OWN_LENGTH,
    # A head on a backbone of fresh weights is not worth training.
    {**reference.overrides, 'stages[-1].freeze_epochs': 0.0},
    only=(stages_lib.create_stages(config.base)[-1].name,),
    control=True,
  )
  return (
    alone,
    *(
      dataclasses.replace(alone, name=f'{OWN_LENGTH}_equal_{kind}', equal=kind)
      for kind in EQUAL
    ),
  )
