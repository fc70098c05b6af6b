"""Every field of a comparison, with its unit and default.

For --mode=compare. The other compare_*.py configs start from it and override:
`start_from('compare_default')`. What is compared are the cells: a ladder with
some fields changed, each trained with several seeds.
"""

from ml_collections import config_dict

from jaxprog import start_from


def get_config() -> config_dict.ConfigDict:
  """Returns a comparison of nothing: all fields, all defaults."""
  config = config_dict.ConfigDict()

  # The ladder that all cells start from; on the command line its fields are
  # --config.base.FIELD.
  config.base = start_from('default')

  # One cell for each combination of an entry of every axis. An axis is a dict:
  # {'stages[-1].batch_size': (32, 64)}, a field and its values; or
  # {'steps': {'stages[-1].schedule': 'step', 'stages[-1].milestones': (4,)},
  # ...}, names and the fields that each changes together.
  config.grid = ()
  # Cells besides: {'name': 'wide', 'overrides': {'num_filters': 32}}; with
  # 'stages': ('tiny_imagenet',) only these are trained.
  config.cells = ()
  # Cells that change how the last stage takes its weights over: {'name':
  # 'reset', 'fields': {'reset_blocks': 1}}, fields of the last stage. Without
  # a grid and cells, the base itself is the cell 'ladder'.
  config.operators = ()

  # Name of the cell that others are compared with, and that has its length
  # from the base; '': the first one.
  config.reference = ''
  # Runs of each cell. Seeds count from base.seed; a seed is the same order of
  # examples in every cell, so runs pair.
  config.seeds = 3
  # The largest number of seeds there may ever be, if more are added until a
  # difference shows; it has to be known before the first look. 0: `seeds`.
  config.max_seeds = 0
  # Differences of final top-1 below this do not matter, in [0, 1): cells that
  # are shown to differ by less are called equal; 0: none are.
  config.margin = 0.0
  # Workdir or comparison.json of an earlier comparison: what a number of seeds
  # can show is said before the first run by how far apart its pairs lie. '':
  # by the runs that are over, else by what is typical.
  config.pilot = ''
  # What is equal in every cell: 'epochs', 'images', 'flops' or 'seconds' of the
  # whole ladder. The last stage's num_epochs follow from it, and what counts
  # epochs with them. 'own': nothing, cells are as long as they say themselves.
  config.budget = 'epochs'
  # Costs are compared where curves first reach this, in [0, 1]; 0: the lowest
  # final top-1 of all runs that are done.
  config.target_top1 = 0.0
  # Also train the last stage alone, from fresh weights: as long as it is, and
  # as long as the whole ladder costs in FLOPs, in images and in seconds.
  config.controls = False

  # The last stage's learning rate is chosen in each cell by successive halving
  # (Jamieson & Talwalkar 2016, arXiv:1502.07943).
  tuning = config_dict.ConfigDict()
  # Multiples of the cell's own rate to try, in every cell the same; (): the
  # own rate is kept.
  tuning.factors = ()
  # Lengths of the trials as parts of the last stage's epochs; each is a run of
  # its own, whose schedule ends with it.
  tuning.rungs = (0.25, 0.5)
  # Part of the trials that goes on to the next rung.
  tuning.keep = 0.5
  # Runs of each trial. Their seeds count from base.seed + first_seed, so that
  # a rate is not chosen on the runs that are compared.
  tuning.seeds = 1
  tuning.first_seed = 1000
  config.tuning = tuning
  # budget 'seconds': epochs of each stage that are timed, the last one of them
  # counts.
  config.timed_epochs = 2

  # Where runs take place: 'serial', one after the other in this process; 'ray',
  # as many at once as a Ray cluster has room for.
  config.engine = 'serial'
  ray = config_dict.ConfigDict()
  # HOST:PORT or ray://HOST:PORT; '': RAY_ADDRESS, else the cluster that this
  # host belongs to, else one of this host alone, for as long as it takes.
  ray.address = ''
  # What each run takes. Cores, of which XLA and the workers that read ahead
  # make as many threads; GPUs, 0.5 is half of the memory of one.
  ray.num_cpus = 1.0
  ray.num_gpus = 0.0
  # What else, by Ray's names: 'TPU=4', 'accelerator_type:H100=0.001'.
  ray.resources = ''
  # How often a run is begun again whose process or host died.
  ray.max_retries = 3
  config.ray = ray
  return config
