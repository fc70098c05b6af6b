"""Trains image classifiers up a ladder of datasets.

    python main.py --config=configs/quickstart.py --workdir=runs/first

--config.FIELD=VALUE overrides one field: --config.stages[0].num_epochs=3.
Without --config, the one that WORKDIR was trained with serves.
"""

import contextlib
import os
import pathlib
import re
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from absl import logging as absl_logging

import jaxprog
from jaxprog import errors, paths
from jaxprog.reliability import signals

_STAGES = ('only', 'skip')
_SAVED = ('stage', 'weights')
_PLACE = ('coordinator', 'process_count', 'process_id', 'connect_seconds')
# The flags that each mode takes, besides --config and --workdir.
MODES: dict[str, tuple[str, ...]] = {
  'train': (*_STAGES, 'allow_config_change', 'dry_run', *_PLACE),
  'check': (*_STAGES, 'allow_config_change'),
  'prepare': (*_STAGES, 'input', 'sha256', 'download'),
  'verify': (*_STAGES, 'checkpoints'),
  'audit': _STAGES,
  'eval': (*_SAVED, 'input', *_PLACE),
  'predict': (*_SAVED, 'input'),
  'report': (),
  'export': _SAVED,
  'lr_find': ('only', 'stage'),
  'compare': (),
  'tune': (),
  'plan': (*_STAGES, 'topology'),
}

FLAGS = flags.FlagValues()
flags.DEFINE_string('config', '', 'Config FILE[:ARG].', flag_values=FLAGS)
flags.DEFINE_string(
  'workdir', '', 'Directory for everything a run writes.', flag_values=FLAGS
)
flags.DEFINE_string('mode', 'train', ', '.join(MODES), flag_values=FLAGS)
flags.DEFINE_list(
  'only', [], 'Train just these stages, in this order.', flag_values=FLAGS
)
flags.DEFINE_list('skip', [], 'Leave out these stages.', flag_values=FLAGS)
flags.DEFINE_string(
  'stage',
  '',
  'eval, predict, export: which stage; else the last one done. lr_find: '
  'which one; else the first.',
  flag_values=FLAGS,
)
flags.DEFINE_string(
  'weights',
  'best',
  'eval, predict, export: best, final or ema.',
  flag_values=FLAGS,
)
flags.DEFINE_bool(
  'allow_config_change',
  False,
  'train, check: go on with a run that began with another config.',
  flag_values=FLAGS,
)
flags.DEFINE_bool(
  'dry_run',
  False,
  'train: two steps, a short evaluation, a save and the hand-over of each '
  'stage, beside WORKDIR; nothing of it is kept.',
  flag_values=FLAGS,
)
flags.DEFINE_bool(
  'checkpoints',
  False,
  'verify: the checkpoints of WORKDIR instead of datasets.',
  flag_values=FLAGS,
)
flags.DEFINE_string(
  'input',
  '',
  'prepare: an archive of raw images. predict: an image or a folder of them. '
  'eval: another dataset with the same classes.',
  flag_values=FLAGS,
)
flags.DEFINE_string(
  'sha256', '', "prepare: the archive's SHA-256.", flag_values=FLAGS
)
flags.DEFINE_bool(
  'download',
  False,
  'prepare: fetch Imagenette and Tiny ImageNet.',
  flag_values=FLAGS,
)
flags.DEFINE_string(
  'topology',
  '',
  'plan: the hardware, such as v5e:4x4, v5p:2x2x2 or h100:8.',
  flag_values=FLAGS,
)
flags.DEFINE_string(
  'coordinator',
  None,
  'train, eval: HOST:PORT of process 0, where no cluster says it.',
  flag_values=FLAGS,
)
flags.DEFINE_integer(
  'process_count', None, 'train, eval: how many.', flag_values=FLAGS
)
flags.DEFINE_integer(
  'process_id',
  None,
  'train, eval: which one this is, from 0.',
  flag_values=FLAGS,
)
flags.DEFINE_integer(
  'connect_seconds',
  300,
  'train, eval: how long processes wait for each other at the start.',
  lower_bound=1,
  flag_values=FLAGS,
)
flags.DEFINE_bool('help', False, 'Show this.', flag_values=FLAGS)


def main(argv: Sequence[str]) -> int:
  """Returns 0, or 1: it failed, 2: the user's mistake, 128 + n: signal n."""
  # TensorFlow, which only writes TensorBoard's files, has much to say.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  # tfds warns that it does not know the configuration of folder:PATH.
  absl_logging.get_absl_logger().addFilter(
    lambda record: 'custom data configuration' not in str(record.msg)
  )
  try:
    overrides = parse_flags(argv)
    check_flags()
    with signals.StopRequest(owns_process=True), processes():
      return run(overrides)
  except errors.UserError as e:
    print(e, file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    return 128 + signal.SIGINT
  except jaxprog.Stopped as e:
    print(f'{e} The same command goes on from there.', file=sys.stderr)
    return e.exit_code
  except Exception as e:
    message = ' '.join(str(e).split())[:300]
    print(f'Failed: {type(e).__name__}: {message}', file=sys.stderr)
    print(write_traceback(), file=sys.stderr)
    return 1


def run(overrides: dict[str, str]) -> int:
  """Does what --mode names; returns the exit code."""
  if FLAGS.help:
    print(__doc__, FLAGS.main_module_help(), sep='\n')
    return 0
  if reads_no_config() and (FLAGS.config or overrides):
    print(f'{describe_mode()} reads no config.', file=sys.stderr)
  if FLAGS.mode == 'verify' and FLAGS.checkpoints:
    return jaxprog.verify_checkpoints(require_workdir())
  if FLAGS.mode == 'report':
    jaxprog.write_report(list_workdirs(require_workdir()))
    return 0
  config = jaxprog.load_config(FLAGS.config or saved_config(), overrides)
  check_kind(config)
  return call(config)


def check_kind(config: Any) -> None:
  """Raises UserError unless the config is one of what --mode does."""
  of_many = 'tune' if 'search' in config else 'compare'
  mode = of_many if 'base' in config else 'train'
  asked = FLAGS.mode if FLAGS.mode in ('compare', 'tune') else 'train'
  if mode == asked:
    return
  if mode == 'train':
    raise errors.UserError(
      f'This config is of one run: --mode={asked} needs another kind.',
      f'--mode={asked}',
      'Start from configs/compare_default.py or configs/tune_default.py.',
    )
  raise errors.UserError(
    'This config is not of one run.'
    if asked == 'train'
    else f'This config is none for --mode={asked}.',
    f'--mode={FLAGS.mode}',
    f'Use --mode={mode}, or the config that it starts from.',
  )


def call(config: Any) -> int:
  """Makes the one call that --mode names with a config; returns the exit code.

  Its reports go to standard output.
  """
  stages = {'only': FLAGS.only, 'skip': FLAGS.skip}
  saved = {'stage': FLAGS.stage, 'weights': FLAGS.weights}
  match FLAGS.mode:
    case 'prepare':
      archive = {'input': FLAGS.input, 'sha256': FLAGS.sha256}
      jaxprog.prepare(config, **stages, **archive, download=FLAGS.download)
    case 'verify':
      return jaxprog.verify(config, FLAGS.workdir or None, **stages)
    case 'audit':
      return jaxprog.audit(config, FLAGS.workdir or None, **stages)
    case 'check':
      allow = {'allow_config_change': FLAGS.allow_config_change}
      return jaxprog.check(config, FLAGS.workdir or None, **stages, **allow)
    case 'train' if FLAGS.dry_run:
      allow = {'allow_config_change': FLAGS.allow_config_change}
      jaxprog.dry_run(config, require_workdir(), **stages, **allow)
    case 'train':
      allow = {'allow_config_change': FLAGS.allow_config_change}
      jaxprog.train(config, require_workdir(), **stages, **allow)
    case 'compare':
      jaxprog.compare(config, require_workdir())
    case 'tune':
      jaxprog.tune(config, require_workdir())
    case 'lr_find':
      found = jaxprog.lr_find(config, require_workdir(), stage=one_stage())
      print(describe_lr_find(found))
    case 'eval':
      scores = jaxprog.evaluate(
        config, require_workdir(), **saved, dataset=FLAGS.input
      )
      import jax

      if jax.process_index() == 0:
        print(f'{100 * scores["top1"]:.1f}')
    case 'predict':
      jaxprog.predict(config, require_workdir(), FLAGS.input, **saved)
    case 'plan':
      if 'JAX_PLATFORMS' not in os.environ:
        import jax

        # Or JAX would look for the hardware that it is to compile for.
        jax.config.update('jax_platforms', 'cpu')
      topology = {'topology': FLAGS.topology}
      jaxprog.plan(config, FLAGS.workdir or None, **topology, **stages)
    case 'export':
      jaxprog.export(config, require_workdir(), **saved)
  return 0


def processes() -> contextlib.AbstractContextManager[None]:
  """Returns what makes this one of the processes of a run, if it is."""
  if FLAGS.help or 'process_id' not in MODES[FLAGS.mode]:
    return contextlib.nullcontext()
  from jaxprog.reliability import cluster

  place = FLAGS.coordinator, FLAGS.process_count, FLAGS.process_id
  names = ('mode', 'only', 'skip', 'stage', 'weights', 'input', 'dry_run')
  values = [f'--{name}={FLAGS[name].value}' for name in names]
  command = ' '.join([*values, f'--allow={FLAGS.allow_config_change}'])
  return cluster.processes(
    cluster.Place(*place), command, FLAGS.connect_seconds
  )


def describe_lr_find(found: Mapping[str, Any]) -> str:
  """Returns what a range test came to, for a person."""
  where = f'{FLAGS.workdir}/lr_find/{found["stage"]}.png'
  if found['suggestion'] is None:
    return f'{found["stage"]}: the loss never fell; see {where}'
  return (
    f'{found["stage"]}: the loss falls fastest at a learning rate of '
    f'{found["suggestion"]:.2g}; see {where}'
  )


def parse_flags(argv: Sequence[str]) -> dict[str, str]:
  """Fills FLAGS and returns the overrides: field of the config -> text."""
  prefix = '--config.'
  overrides, rest = {}, [argv[0]]
  for word in argv[1:]:
    if word.startswith(prefix):
      field, equals, text = word[len(prefix) :].partition('=')
      if not equals:
        raise errors.UserError(
          'An override needs a value.', word, f'Write {word}=VALUE.'
        )
      overrides[field] = text
    else:
      rest.append(word)
  try:
    unused = FLAGS(rest)[1:]
  except flags.UnrecognizedFlagError as e:
    suggestion = errors.did_you_mean(e.flagname, FLAGS)
    raise errors.UserError(
      f'Unknown flag --{e.flagname}.', '', suggestion
    ) from None
  except flags.Error as e:
    # 'flag --NAME=VALUE: why'
    found = re.fullmatch(r'flag (--(\w+)=.*?): (.*)', str(e), re.DOTALL)
    if not found:
      raise errors.UserError(f'A flag is wrong: {e}.') from None
    where, name, _ = found.groups()
    kind = 'true or false' if FLAGS[name].boolean else 'a whole number'
    least = getattr(FLAGS[name].parser, 'lower_bound', None)
    if least is not None:
      kind += f', at least {least}'
    raise errors.UserError(
      f'--{name} takes {kind}.', where, FLAGS[name].help
    ) from None
  if unused:
    raise errors.UserError(
      f'{unused[0]!r} belongs to no flag.', '', 'Flags are --NAME=VALUE.'
    )
  return overrides


def check_flags() -> None:
  """Raises UserError for a mode that is none, or that a flag is not for."""
  if FLAGS.help:
    return
  if FLAGS.mode not in MODES:
    raise errors.UserError(
      f'Unknown mode {FLAGS.mode!r}.',
      f'--mode={FLAGS.mode}',
      errors.did_you_mean(FLAGS.mode, MODES),
    )
  taken = MODES[FLAGS.mode]
  if FLAGS.mode == 'verify' and FLAGS.checkpoints:
    taken = ('checkpoints',)  # All of the workdir.
  for name in {*FLAGS} - {*taken, 'config', 'workdir', 'mode', 'help'}:
    flag = FLAGS[name]
    given = flag.present and flag.value is not False
    # What is empty asks for nothing: scripts pass on what they were not given.
    if given and flag.value not in ('', [], None):
      modes = [mode for mode in MODES if name in MODES[mode]]
      raise errors.UserError(
        f'{describe_mode()} takes no --{name}.',
        flag.serialize(),
        f'Leave it out; it is for --mode={", ".join(modes)}.',
      )


def reads_no_config() -> bool:
  """Returns whether what is asked for concerns the workdir alone."""
  return FLAGS.mode == 'report' or FLAGS.checkpoints


def describe_mode() -> str:
  """Returns the mode as it was asked for."""
  of_checkpoints = FLAGS.mode == 'verify' and FLAGS.checkpoints
  return f'--mode={FLAGS.mode}' + ' --checkpoints' * of_checkpoints


def one_stage() -> str:
  """Returns the stage that --only or --stage names, '' if none does."""
  names = {*FLAGS.only, FLAGS.stage} - {''}
  if len(names) > 1:
    raise errors.UserError(
      f'--mode={FLAGS.mode} is for one stage.',
      f'--only={",".join(FLAGS.only)}'
      + f' --stage={FLAGS.stage}' * bool(FLAGS.stage),
      'Name one of them.',
    )
  return next(iter(names), '')


def list_workdirs(text: str) -> list[str]:
  """Returns the workdirs in A,B; a name with a comma is one if it is there."""
  if os.path.exists(paths.expand(text, f'--workdir={text}')):
    return [text]
  return [x for x in text.split(',') if x] or [text]


def saved_config() -> str:
  """Returns the path of the config that the workdir was trained with."""
  if not FLAGS.workdir:
    raise errors.UserError(
      'There is no --config.',
      f'--mode={FLAGS.mode}',
      'Begin with --config=configs/quickstart.py.',
    )
  from jaxprog.reporting import rundir

  workdir = paths.workdir(FLAGS.workdir)
  rundir.check(workdir)
  path = workdir / 'config.json'
  if not path.is_file():
    raise errors.UserError(
      f'The run in {workdir} has no config.json.',
      f'--mode={FLAGS.mode}',
      'Name the --config that it was trained with.',
    )
  return str(path)


def require_workdir() -> str:
  """Returns --workdir."""
  if not FLAGS.workdir:
    raise errors.UserError(
      'There is no --workdir.',
      f'--mode={FLAGS.mode}',
      'Name a directory for what the run writes: --workdir=runs/first.',
    )
  return FLAGS.workdir


def write_traceback() -> str:
  """Returns the traceback, or where it is: in WORKDIR/error.log.

  No workdir is made for it.
  """
  if FLAGS.workdir:
    with contextlib.suppress(OSError, errors.UserError):
      path = paths.workdir(FLAGS.workdir) / 'error.log'
      with open(path, 'a', errors='backslashreplace') as file:
        traceback.print_exc(file=file)
      return f'Traceback: {path}'
  return traceback.format_exc().rstrip()


def use_huge_pages() -> None:
  """Starts the process anew with huge pages, if only the allocator lacks them.

  XLA's CPU buffers are new in every step. In pages of 4 KB, clearing them took
  a sixth of a ResNet-18's step; glibc listens to this at its start alone.
  """
  setting = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')
  if 'GLIBC_TUNABLES' in os.environ or not setting.is_file():
    return
  if '[madvise]' in setting.read_text():
    os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def start() -> None:
  """Runs the command line as a process of its own."""
  use_huge_pages()
  code = main(sys.argv)
  if code:  # Nobody waits for threads of a run that has ended early.
    signals.leave(code)
