"""Every field of a hyper-parameter search, with its unit and default.

For --mode=tune. Other tune_*.py configs start from it and override:
`start_from('tune_default')`.
"""

from ml_collections import config_dict

from jaxprog import start_from


def get_config() -> config_dict.ConfigDict:
  """Returns a search for nothing: all fields, all defaults."""
  config = config_dict.ConfigDict()

  # The ladder that every trial starts from; on the command line its fields are
  # --config.base.FIELD.
  config.base = start_from('default')
  # Fields of the ladder to search, each with one of
  #   'uniform': (low, high)         any number between them
  #   'log': (low, high)             the same, its logarithm uniform
  #   'integer': (low, high)         both included
  #   'choice': (a, b, ...)          one of them
  # such as {'field': 'stages[-1].learning_rate', 'log': (1e-4, 1e-1)}.
  config.search = ()
  # Stages that each trial trains; (): all. The best top-1 of the last one is
  # what is maximised.
  config.only = ()
  # Trials that end well or are pruned, over all starts of the search.
  config.num_trials = 20
  # No trial begins after so many minutes of this start; 0: no limit.
  config.timeout_minutes = 0.0
  # 'tpe' (Bergstra et al. 2011) or 'random'.
  config.sampler = 'tpe'
  # Decides what is tried, with several trials at once the order too in which
  # they end; trials all have the seed of the ladder.
  config.sampler_seed = 0
  # 'none'; 'median': a trial ends when its last stage is worse than the median
  # of those before it at the same epoch; 'hyperband' (arXiv:1603.06560).
  config.pruner = 'median'
  # Trials that are never pruned, and epochs of each that are not.
  config.pruner_startup_trials = 5
  config.pruner_warmup_epochs = 1
  # Where Optuna keeps what is known. 'journal': in WORKDIR/tune.journal, also
  # for many workers, and on NFS; '': the same with 'ray', else in
  # WORKDIR/tune.db, which is SQLite's and for one process. Or in a database,
  # postgresql://USER:$NAME@HOST/DATABASE, mysql://…: its driver has to be
  # installed; $NAME stands for what the environment has, such as a password.
  config.storage = ''
  # Where trials take place, as in compare_default: 'serial' or 'ray'.
  compare = start_from('compare_default')
  config.engine = compare.engine
  config.ray = compare.ray
  return config
