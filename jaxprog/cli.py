"""Trains image classifiers up a ladder of datasets.

  jaxprog --config=quickstart --workdir=runs/first

--config=NAME[:ARG]   a config that is shipped: quickstart, progressive:resnet18
--config=FILE[:ARG]   or one of your own; without any, the one that WORKDIR was
                      trained with serves
--config.FIELD=VALUE  overrides one field: --config.stages[0].num_epochs=3
--workdir=DIR         for everything a run writes, or gs://BUCKET/PATH
--version, --help     -h too; with --mode=MODE: its flags and an example
--mode=MODE           one of
"""

import contextlib
import os
import pathlib
import re
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags
from absl import logging as absl_logging

import jaxprog
from jaxprog import buckets, errors, fields, formats, paths, version
from jaxprog.monitoring import activity
from jaxprog.reliability import signals
from jaxprog.training import xla_flags

Flags = flags.FlagValues
# When the command began, about.
_BEGAN = time.monotonic()


class Mode(NamedTuple):
  """What --mode names: a row here, and a function of tools/ that it calls."""

  what: str
  example: str
  # Those it takes besides what all take, and what each is for.
  flags: Mapping[str, str] = {}
  needs_workdir: bool = True
  # Takes the config, the workdir and `flags` by name, and returns the exit code
  # if that is not 0; None: the function of `jaxprog` that has the mode's name.
  call: Callable[..., Any] | None = None


def _train(config: Any, workdir: str, *, dry_run: bool, **given: Any) -> None:
  if dry_run:
    jaxprog.dry_run(config, workdir, **given)
    return
  history = jaxprog.train(config, workdir, **given)
  import jax

  if jax.process_index() == 0:
    print(_describe_end(history, workdir))


def _describe_end(history: Mapping[str, Any], workdir: str) -> str:
  """Returns what a run took, where its report is, and what comes next."""
  from jaxprog.training import preflight

  trained = formats.duration(sum(x['seconds'] for x in history['stages']))
  took = formats.duration(time.monotonic() - _BEGAN)
  place = workdir.rstrip('/')
  lines = [
    f'trained  {trained}, this command took {took}',
    f'report   {place}/report.html',
  ]
  for mode, more in (
    ('eval', []),
    ('predict', ['--input=IMAGES']),
    ('export', []),
  ):
    words = [f'--mode={mode}', f'--workdir={workdir}', *more]
    command = shlex.join([*preflight.command(), *words])
    lines.append(f'{"next" if mode == "eval" else "":9}{command}')
  return '\n'.join(lines)


def _prepare(config: Any, workdir: str | None, **given: Any) -> None:
  del workdir  # Only its config may have been read.
  jaxprog.prepare(config, **given)


def _verify(
  config: Any, workdir: str, *, checkpoints: bool, **given: Any
) -> int:
  if checkpoints:
    return jaxprog.verify_checkpoints(workdir)
  return jaxprog.verify(config, workdir, **given)


def _evaluate(
  config: Any,
  workdir: str,
  *,
  input: str,
  probe: bool,
  calibrate: bool,
  flip_average: bool,
  eval_image_size: Sequence[str],
  **saved: Any,
) -> None:
  sizes = _parse_sizes(eval_image_size)
  if probe:
    lines = [
      f'{x["from"]} {x["to"]} {100 * x["top1"]:.1f}'
      for x in jaxprog.probe(config, workdir)
    ]
  elif calibrate:
    found = jaxprog.calibrate(config, workdir, **saved)
    lines = [f'{found["temperature"]:.3f}']
  elif len(sizes) > 1:
    rows = jaxprog.size_sweep(
      config,
      workdir,
      sizes,
      dataset=input,
      flip_average=flip_average,
      **saved,
    )
    lines = ['size  top-1  top-5'] + [
      f'{x["image_size"]:4}  {100 * x["top1"]:5.1f}  {100 * x["top5"]:5.1f}'
      for x in rows
    ]
  else:
    scores = jaxprog.evaluate(
      config,
      workdir,
      dataset=input,
      flip_average=flip_average,
      eval_image_size=sizes[0] if sizes else 0,
      **saved,
    )
    lines = [f'{100 * scores["top1"]:.1f}']
  import jax

  if jax.process_index() == 0:
    print('\n'.join(lines))


def _parse_sizes(texts: Sequence[str]) -> list[int]:
  try:
    return [int(x) for x in texts]
  except ValueError:
    raise errors.UserError(
      '--eval_image_size takes whole numbers of pixels.',
      f'--eval_image_size={",".join(texts)}',
      'One, or several for a table: --eval_image_size=96,128,160.',
    ) from None


def _report(config: None, workdir: str) -> None:
  """Workdirs are A,B; a name with a comma is one if it is there."""
  whole = os.path.exists(paths.expand(workdir, f'--workdir={workdir}'))
  names = [] if whole else [x for x in workdir.split(',') if x]
  jaxprog.write_report(names or [workdir])


def _lr_find(
  config: Any, workdir: str, *, only: Sequence[str], stage: str
) -> None:
  names = {*only, stage} - {''}
  if len(names) > 1:
    raise errors.UserError(
      '--mode=lr_find is for one stage.',
      f'--only={",".join(only)}' + f' --stage={stage}' * bool(stage),
      'Name one of them.',
    )
  found = jaxprog.lr_find(config, workdir, stage=next(iter(names), ''))
  said = 'the loss never fell'
  if found['suggestion'] is not None:
    rate = f'{found["suggestion"]:.2g}'
    said = f'the loss falls fastest at a learning rate of {rate}'
  print(f'{found["stage"]}: {said}; see {workdir}/lr_find/{found["stage"]}.png')


def _plan(config: Any, workdir: str | None, **given: Any) -> None:
  if 'JAX_PLATFORMS' not in os.environ:
    import jax

    # Or JAX would look for the hardware that it is to compile for.
    jax.config.update('jax_platforms', 'cpu')
  jaxprog.plan(config, workdir, **given)


_STAGES = {
  'only': 'Just these stages, in this order: --only=four,seven.',
  'skip': 'All stages but these.',
}
_SAVED = {
  'stage': 'Whose weights; else those of the last stage done.',
  'weights': 'best (if not said), final or ema.',
}
_CHANGE = {
  'allow_config_change': 'Go on with a run that began with another config.'
}
# Modes that say what they do where a run says how far it is; what others print
# is for other programs too.
_TRAINING = ('train', 'compare', 'tune')
_EVERYWHERE = ('config', 'workdir', 'mode', 'version', 'help', 'h')
# Which of the processes of a run this is.
_PLACE = {
  'coordinator': 'HOST:PORT of process 0, where no cluster says it.',
  'process_count': 'How many processes there are.',
  'process_id': 'Which one this is, from 0.',
  'connect_seconds': 'How long they wait for each other at the start (300).',
}
# What some flags leave of those that their mode takes.
_NARROWED = {
  'checkpoints': set[str](),  # All of the workdir.
  'probe': {*_PLACE},  # All of its stages.
  'calibrate': {*_SAVED, *_PLACE},
}
MODES: dict[str, Mode] = {
  'train': Mode(
    'Trains the stages, or goes on where it was stopped.',
    '--config=quickstart --workdir=runs/first',
    {
      **_STAGES,
      **_CHANGE,
      'dry_run': 'Two steps of every stage and all else; nothing is kept.',
      **_PLACE,
    },
    call=_train,
  ),
  'check': Mode(
    'Says what would stop a run, and what each stage will cost.',
    '--config=quickstart --workdir=runs/first',
    {**_STAGES, **_CHANGE},
    needs_workdir=False,
  ),
  'prepare': Mode(
    'Prepares the datasets, so that training begins at once.',
    '--config=progressive --config.data_dir=/data',
    {
      **_STAGES,
      'input': 'An archive of raw images to unpack first.',
      'sha256': "The archive's SHA-256.",
      'download': 'Fetch Imagenette and Tiny ImageNet.',
    },
    needs_workdir=False,
    call=_prepare,
  ),
  'verify': Mode(
    'Reads every image of the datasets, or all checkpoints of a run.',
    '--config=progressive',
    {**_STAGES, 'checkpoints': 'Those of WORKDIR instead of datasets.'},
    needs_workdir=False,
    call=_verify,
  ),
  'audit': Mode(
    'Looks for training images on which some stage is evaluated.',
    '--config=progressive',
    _STAGES,
    needs_workdir=False,
  ),
  'eval': Mode(
    'Scores saved weights on the evaluation images.',
    '--workdir=runs/first --stage=ten',
    {
      **_SAVED,
      'input': 'Another dataset with the same classes, or a test set.',
      'flip_average': 'Mean logits of an image and its mirror image.',
      'eval_image_size': 'Another size in pixels; of several a table.',
      'calibrate': 'Fit a temperature, for predict and export.',
      'probe': "What each stage's weights know of the data of later ones.",
      **_PLACE,
    },
    call=_evaluate,
  ),
  'predict': Mode(
    'Says what images show.',
    '--workdir=runs/first --input=photos',
    {**_SAVED, 'input': 'An image, or a folder of them.'},
  ),
  'report': Mode(
    'Makes the reports of a run anew, or sets several side by side.',
    '--workdir=runs/first,runs/second',
    call=_report,
  ),
  'export': Mode(
    'Writes saved weights for timm, and a program for serving.',
    '--workdir=runs/first',
    _SAVED,
  ),
  'lr_find': Mode(
    'Tests which learning rate suits a stage.',
    '--config=quickstart --workdir=runs/first --only=ten',
    dict.fromkeys(('only', 'stage'), 'Which stage; else the first.'),
    call=_lr_find,
  ),
  'compare': Mode(
    'Trains many runs at equal cost, and says what they show.',
    '--config=compare_strategies --workdir=runs/strategies',
  ),
  'tune': Mode(
    'Searches hyper-parameters.',
    '--config=tune_digits --workdir=runs/tune',
  ),
  'plan': Mode(
    'Tells memory, hours and cost on hardware that is not here.',
    '--config=progressive --topology=v5e:4x4',
    {'topology': 'Such as v5e:4x4, v5p:2x2x2 or h100:8.', **_STAGES},
    needs_workdir=False,
    call=_plan,
  ),
}


def create_flags() -> Flags:
  """Returns every flag, as nobody has given it."""
  asked = flags.FlagValues()
  for name in ('config', 'workdir', 'stage', 'input', 'sha256', 'topology'):
    flags.DEFINE_string(name, '', '', asked)
  for name, default in (('mode', 'train'), ('weights', 'best')):
    flags.DEFINE_string(name, default, '', asked)
  flags.DEFINE_string('coordinator', None, '', asked)
  for name in ('only', 'skip', 'eval_image_size'):
    flags.DEFINE_list(name, [], '', asked)
  for name in ('process_count', 'process_id'):
    flags.DEFINE_integer(name, None, '', flag_values=asked)
  flags.DEFINE_integer(
    'connect_seconds', 300, '', lower_bound=1, flag_values=asked
  )
  for name in (
    'allow_config_change',
    'calibrate',
    'checkpoints',
    'download',
    'dry_run',
    'flip_average',
    'probe',
  ):
    flags.DEFINE_bool(name, False, '', asked)
  flags.DEFINE_bool('help', False, '', asked, short_name='h')
  flags.DEFINE_bool('version', False, '', asked)
  return asked


def main(argv: Sequence[str]) -> int:
  """Returns 0, or 1: it failed, 2: the user's mistake, 128 + n: signal n."""
  # TensorFlow, which can write TensorBoard's files, has much to say.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  # tfds warns that it does not know the configuration of folder:PATH.
  absl_logging.get_absl_logger().addFilter(
    lambda record: 'custom data configuration' not in str(record.msg)
  )
  asked = create_flags()
  try:
    overrides = parse_flags(asked, argv)
    if asked.version:
      print(f'jaxprog {version.VERSION}')
      return 0
    check_flags(asked)
    if asked.help:
      print(_describe(asked.mode if asked['mode'].present else ''))
      return 0
    activity.use('stdout' if asked.mode in _TRAINING else 'stderr')
    with (
      activity.doing(f'jaxprog {version.VERSION}, {asked.mode}'),
      signals.StopRequest(owns_process=True),
      _processes(asked),
    ):
      return run(asked, overrides)
  except errors.UserError as e:
    print(buckets.shown(str(e)), file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    return 128 + signal.SIGINT
  except errors.Stopped as e:
    print(f'{e} The same command goes on from there.', file=sys.stderr)
    return e.exit_code
  except Exception as e:
    message = ' '.join(str(e).split())[:500]
    print(f'Failed: {type(e).__name__}: {message}', file=sys.stderr)
    print(_write_traceback(e, asked['workdir'].value or ''), file=sys.stderr)
    return 1


def run(asked: Flags, overrides: Mapping[str, str]) -> int:
  """Does what --mode names; returns the exit code.

  Its reports go to standard output.
  """
  mode, config = MODES[asked.mode], None
  of_workdir = asked.mode == 'report' or asked.checkpoints
  if not of_workdir:
    from jaxprog import config as config_lib

    spec = asked.config or _saved_config(asked)
    config = jaxprog.load_config(spec, overrides)
    config_lib.check_kind(config, asked.mode)
  elif asked.config or overrides:
    print(f'{_name_mode(asked)} reads no config.', file=sys.stderr)
  workdir = asked.workdir or None
  if not workdir and (mode.needs_workdir or of_workdir):
    raise errors.UserError(
      'There is no --workdir.',
      f'--mode={asked.mode}',
      'Name a directory for what the run writes: --workdir=runs/first.',
    )
  given = {x: asked[x].value for x in mode.flags if x not in _PLACE}
  call = mode.call or getattr(jaxprog, asked.mode)
  if config is not None:
    xla_flags.use(config.get('base', config).xla_flags)
  code = call(config, workdir, **given)
  return code if isinstance(code, int) else 0


def _processes(asked: Flags) -> contextlib.AbstractContextManager[None]:
  """Returns what makes this one of the processes of a run, if it is."""
  if 'process_id' not in MODES[asked.mode].flags:
    return contextlib.nullcontext()
  from jaxprog.reliability import cluster

  place = asked.coordinator, asked.process_count, asked.process_id
  names = (
    *('mode', 'only', 'skip', 'stage', 'weights', 'input', 'dry_run'),
    *('flip_average', 'eval_image_size', 'calibrate', 'probe'),
  )
  values = [f'--{name}={asked[name].value}' for name in names]
  command = ' '.join([*values, f'--allow={asked.allow_config_change}'])
  return cluster.processes(
    cluster.Place(*place), command, asked.connect_seconds
  )


def parse_flags(asked: Flags, argv: Sequence[str]) -> dict[str, str]:
  """Fills `asked` and returns the overrides: field of the config -> text."""
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
    unused = asked(rest)[1:]
  except flags.UnrecognizedFlagError as e:
    raise _unknown(e.flagname, e.flagvalue, asked) from None
  except flags.Error as e:
    # 'flag --NAME=VALUE: why'
    found = re.fullmatch(r'flag (--(\w+)=.*?): (.*)', str(e), re.DOTALL)
    if not found:
      raise errors.UserError(f'A flag is wrong: {e}.') from None
    where, name, _ = found.groups()
    kind = 'true or false' if asked[name].boolean else 'a whole number'
    least = getattr(asked[name].parser, 'lower_bound', None)
    if least is not None:
      kind += f', at least {least}'
    texts = (mode.flags[name] for mode in MODES.values() if name in mode.flags)
    more = next(texts, '')
    raise errors.UserError(f'--{name} takes {kind}.', where, more) from None
  if unused:
    where, how = '', 'Flags are --NAME=VALUE.'
    before = rest[rest.index(unused[0]) - 1].rpartition('=')[2]
    for name, names in (('only', asked.only), ('skip', asked.skip)):
      if names and before == ','.join(names):
        where = f'--{name}={" ".join([before, *unused])}'
        how = f'Commas separate names: {where.replace(" ", ",")}.'
    raise errors.UserError(f'{unused[0]!r} belongs to no flag.', where, how)
  return overrides


def _unknown(name: str, word: str, asked: Flags) -> errors.UserError:
  """Returns the error for a flag that there is not; of a field, where it is."""
  of_stage = name in fields.STAGE
  if not of_stage and name not in fields.CONFIG:
    suggestion = errors.did_you_mean(name, asked)
    return errors.UserError(f'Unknown flag --{name}.', '', suggestion)
  path = '--config.' + 'base.' * (asked['mode'].value in ('compare', 'tune'))
  path += 'stages[0].' * of_stage
  return errors.UserError(
    f'{name} is a field of {"a stage" if of_stage else "the config"}.',
    word,
    f'Write {path}{word.lstrip("-")}' + '=VALUE' * ('=' not in word) + '.',
  )


def check_flags(asked: Flags) -> None:
  """Raises UserError for a mode that is none, or that a flag is not for."""
  if asked.mode not in MODES:
    raise errors.UserError(
      f'Unknown mode {asked.mode!r}.',
      f'--mode={asked.mode}',
      errors.did_you_mean(asked.mode, MODES),
    )
  taken = {*MODES[asked.mode].flags}
  narrow = _narrow(asked)
  if narrow in taken:
    taken = {narrow, *(_NARROWED[narrow] & taken)}
  for name in {*asked} - {*taken, *_EVERYWHERE}:
    flag = asked[name]
    given = flag.present and flag.value is not False
    # What is empty asks for nothing: scripts pass on what they were not given.
    if given and flag.value not in ('', [], None):
      if name in fields.STAGE:
        raise _unknown(name, flag.serialize(), asked)
      modes = [mode for mode in MODES if name in MODES[mode].flags]
      where = f'; it is for --mode={", ".join(modes)}'
      if asked.mode in modes:
        where = f', or --{narrow}'
      raise errors.UserError(
        f'{_name_mode(asked)} takes no --{name}.',
        flag.serialize(),
        f'Leave it out{where}.',
      )


def _narrow(asked: Flags) -> str:
  """Returns the flag that leaves few others to its mode, '' if none does."""
  return next((name for name in _NARROWED if asked[name].value), '')


def _name_mode(asked: Flags) -> str:
  """Returns the mode as it was asked for."""
  narrow = _narrow(asked)
  is_taken = asked.mode in MODES and narrow in MODES[asked.mode].flags
  return f'--mode={asked.mode}' + f' --{narrow}' * is_taken


def _describe(mode: str) -> str:
  """Returns what --help prints, of one mode or '': of all."""
  if not mode:
    rows = [f'  {name:9}{row.what}' for name, row in MODES.items()]
    return '\n'.join([str(__doc__).rstrip(), *rows])
  lines = [f'--mode={mode}: {MODES[mode].what}']
  lines += ['', f'  jaxprog --mode={mode} {MODES[mode].example}', '']
  lines += [f'--{name:21}{text}' for name, text in MODES[mode].flags.items()]
  return '\n'.join([*lines, '--help alone tells what every mode takes.'])


def _saved_config(asked: Flags) -> str:
  """Returns the path of the config that the workdir was trained with."""
  if not asked.workdir:
    raise errors.UserError(
      'There is no --config.',
      f'--mode={asked.mode}',
      'Begin with --config=quickstart.',
    )
  from jaxprog.reliability import copies
  from jaxprog.reporting import rundir

  if buckets.is_url(asked.workdir):
    path = copies.fetch_config(asked.workdir)
  else:
    rundir.check(paths.workdir(asked.workdir))
    path = paths.workdir(asked.workdir) / 'config.json'
  if not path.is_file():
    raise errors.UserError(
      f'The run in {asked.workdir} has no config.json.',
      f'--mode={asked.mode}',
      'Name the --config that it was trained with.',
    )
  return str(path)


def _write_traceback(error: Exception, workdir: str) -> str:
  """Returns the traceback, or where it is: in WORKDIR/error.log.

  No workdir is made for it.
  """
  if not workdir:
    return traceback.format_exc().rstrip()
  try:
    path = paths.workdir(workdir) / 'error.log'
    with open(path, 'a', errors='backslashreplace') as file:
      traceback.print_exc(file=file)
  except (OSError, errors.UserError):
    return traceback.format_exc().rstrip()
  # What could not be uploaded just now cannot be either.
  if buckets.is_url(workdir) and not isinstance(
    error.__cause__, errors.UserError
  ):
    from jaxprog.reliability import copies

    with contextlib.suppress(errors.UserError):
      copies.send(workdir, path)
      return f'Traceback: {buckets.shown(path)}'
  return f'Traceback: {path}'


def _use_huge_pages() -> None:
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
  _use_huge_pages()
  if not sys.flags.safe_path:  # A config imports what lies here, as for -m.
    sys.path.append(os.getcwd())
  code = main(sys.argv)
  if code:  # Nobody waits for threads of a run that has ended early.
    signals.leave(code)
