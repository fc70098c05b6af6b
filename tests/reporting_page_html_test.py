import base64
import csv
import datetime
import io
import itertools
import math
import operator
import re
import time
from html import parser
from urllib import parse

import chromium
import history_fixture
import pytest
from PIL import Image

from jaxprog import config as config_lib
from jaxprog import files, stages, start_from
from jaxprog.reporting import baselines, rundir
from jaxprog.reporting import timeline as timeline_lib
from jaxprog.reporting.page import (
  curves,
  html,
  overview,
  script,
  sections,
  style,
)
from jaxprog.reporting.page import time as time_lib

# Without --mode=plan there is no section of it.
SECTIONS = [x.name for x in sections.SECTIONS if x.name != 'plan']
# What the page itself has in it.
SCRIPT = f'<script>{script.SCRIPT}</script>'
EVIL = '<script>alert("1")</script>&'
ENVIRONMENT = {
  'time': '2026-11-24T12:00:00+00:00',
  'host': 'machine',
  'versions': {'jax': '0.10.2'},
  'devices': {'kind': 'NVIDIA A100-SXM4-80GB', 'count': 4},
  'git': {'commit': 'c0ffee', 'dirty': True},
  'command': f'python main.py --config={EVIL}',
}


class Reader(parser.HTMLParser):
  """Collects a page's elements, texts and ids; checks that it is nested."""

  def __init__(self, page):
    super().__init__()
    self.elements, self.texts, self._open = [], [], []
    self.feed(page)
    assert not self._open

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    self._open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    if self._open and self._open[-1] not in ('style', 'script'):
      self.texts.append(data)

  def ids(self):
    return [x['id'] for _, x in self.elements if 'id' in x]

  def words(self):
    return ' '.join(' '.join(self.texts).split())


def read(history, **fields):
  return Reader(html.page(rundir.RunFiles('run', history, **fields)))


def quickstart_config():
  return config_lib.to_json(stages.complete(start_from('quickstart')))


def jpeg():
  out = io.BytesIO()
  Image.new('RGB', (32, 24), (200, 30, 30)).save(out, 'JPEG')
  return base64.b64encode(out.getvalue()).decode()


def diagnose(classes, thumbnail=None):
  """Returns the diagnostics of 10 images a class, 2 of each mistaken."""
  n = len(classes)
  pairs = [(i, i, 8) for i in range(n)] + [
    (i, (i + 1) % n, 2) for i in range(n)
  ]
  return {
    'weights': 'best',
    'epoch': 4,
    'num_images': 10 * n,
    'top1': 0.8,
    'nll': 0.5,
    'ece': 0.0321,
    'calibration': [[0, 0.0, 0.0]] * 14 + [[10 * n, 0.97, 0.8]],
    'per_class': [[10, 8]] * n,
    'confusions': [
      {'label': a, 'predicted': b, 'count': count} for a, b, count in pairs
    ][:400],
    'classes': classes,
    'worst': [
      {
        'index': 3,
        'name': 'a/3.png',
        'label': 0,
        'predicted': 1,
        'confidence': 0.987,
        'loss': 4.25,
        'thumbnail': jpeg() if thumbnail is None else thumbnail,
      }
    ],
  }


def eventful():
  """Returns the ladder with all that may befall it, and its incidents."""
  history = history_fixture.create_history()
  first, second, third, last = history['stages']
  first['diagnostics'] = diagnose([f'class {i}' for i in range(10)])
  second['diagnostics'] = diagnose([f'class {i}' for i in range(200)])
  second['resumed_at_steps'] = [12_000, 15_000]
  third.update(status='stopped_early', stopped='out of patience')
  third['epochs'] = third['epochs'][:12]
  third['rollbacks'] = [{'at': 700, 'to': 600}]
  last['status'] = 'running'
  for row in last['epochs']:
    row['ema_top1'] = row['val_top1']
  last['epochs'][7]['train_loss'] = None
  last['step_seconds'] = [[0.0625, 3], [0.125, 4], [0.25, 1]]
  incident = {
    'time': '2026-11-24T13:00:00+00:00',
    'kind': 'skipped_step',
    'stage': 'tiny_imagenet',
    'step': 30,
    'message': 'step 30 was not finite',
  }
  return history, [incident]


def test_every_section_is_there_and_listed():
  page = read(history_fixture.create_history())
  names = SECTIONS
  assert [x for x in page.ids() if x in names] == names
  links = [x['href'] for tag, x in page.elements if tag == 'a']
  assert links.pop(-1).startswith('data:text/csv')
  assert links == [f'#{name}' for name in names]
  assert len(set(page.ids())) == len(page.ids())


def test_figures_are_those_of_the_history():
  history = history_fixture.create_history()
  page = read(history)
  words = page.words()
  for stage in history['stages']:
    best = stage['best']
    assert f'{best["top1"]:.1%} top-1, epoch {best["epoch"]}' in words
    for row in stage['epochs']:
      figures = (
        f'{row["epoch"]} {row["global_step"]:,} {row["train_loss"]:.4f} '
        f'{row["train_top1"]:.1%} {row["val_loss"]:.4f} {row["val_top1"]:.1%}'
      )
      assert figures in words
  last = history['stages'][-1]
  assert words.index(f'{last["best"]["top1"]:.1%}') < words.index('imagenette')


def test_the_headline_is_the_one_look_at_validation_after_a_holdout():
  history = history_fixture.create_history((3,))
  history['stages'][0]['eval_split'] = 'holdout:2%'
  history['stages'][0]['validation'] = {
    'top1': 0.4321,
    'num_images': 3925,
    'epoch': 2,
  }
  words = read(history).words()
  assert '43.2% top-1 of imagenette on 3,925 validation images' in words
  assert '43.2% top-1, epoch' in words  # The card.
  assert words.count('43.2%') >= 5  # And the scorecard's figure and tables.
  assert 'on a hold-out' not in words
  assert 'epoch 2 was chosen on holdout:2%' in words


def test_before_the_look_at_validation_it_is_said_that_a_holdout_chose():
  history = history_fixture.create_history((3,))
  history['stages'][0].update(eval_split='holdout:2%', num_eval_images=189)
  words = read(history).words()
  assert 'on 189 training images held out' in words
  assert '9,469 189 held out' in words
  assert 'top-1, epoch 3, on a hold-out' in words
  assert 'validation images, here on a hold-out' in words


def test_none_was_mistaken_only_if_all_were_right():
  history = history_fixture.create_history((3,))
  found = diagnose(['a', 'b'])
  found['confusions'] = found['confusions'][:2]  # The right ones alone.
  history['stages'][0]['diagnostics'] = found
  words = read(history).words()
  assert '4 of 20 images were not recognised' in words
  assert 'no image was mistaken' not in words
  found['per_class'] = [[10, 10], [10, 10]]
  assert 'None: no image was mistaken.' in read(history).words()


def test_a_mistake_that_cannot_be_decoded_was_taken_for_nothing():
  history = history_fixture.create_history((3,))
  found = diagnose(['a', 'b'], thumbnail='')
  history['stages'][0].update(
    diagnostics=found, bad_images={'a/3.png': 'truncated'}
  )
  words = read(history).words()
  assert 'cannot be decoded' in words
  assert 'taken for b, 99%' not in words


def test_what_is_not_finite_of_the_best_weights_is_a_dash():
  history = history_fixture.create_history((3,))
  found = diagnose(['a', 'b'])
  # JSON has null where a number is not finite.
  found.update(nll=None, ece=None, calibration=[[0, 0.0, 0.0], [20, None, 0.8]])
  found['worst'][0].update(confidence=None, loss=None)
  history['stages'][0]['diagnostics'] = found
  page = read(history)
  assert 'taken for b, -' in page.words()
  assert 'a/3.png: loss -' in [x.get('title') for _, x in page.elements]


def test_the_time_says_what_is_in_no_figure():
  history = history_fixture.create_history((2,))
  assert 'before saves and compilation were timed' in read(history).words()
  history['wall_seconds'] = 1e6
  assert 'The rest is the start' in read(history).words()
  # An older program has trained the first stage.
  history['stages'][0].pop('compile_seconds', None)
  assert 'of imagenette were not timed' in read(history).words()
  history['stages'][0]['compile_seconds'] = 1.0
  assert 'were not timed' not in read(history).words()
  history['stages'][0]['resumed_at_steps'] = [100]
  words = read(history).words()
  assert 'resumed in its middle counts only the time since' in words


def test_a_run_lasts_no_shorter_than_its_stages():
  history = history_fixture.create_history((2,))
  history['stages'][0]['seconds'] = 3600.0
  history['stages'][0]['epochs'][0] |= {'seconds': 3600.0, 'eval_seconds': 0.0}
  history['stages'][0]['epochs'][1] |= {'seconds': 0.0, 'eval_seconds': 0.0}
  history['wall_seconds'] = 60.0  # Of a call after the history was lost.
  assert '1:00:00 from start to end' in read(history).words()


def test_interrupted_resumed_and_stopped_runs_say_so():
  history, incidents = eventful()
  config = {**quickstart_config(), 'model': 'resnet50'}
  page = read(history, incidents=incidents, config=config)
  words = page.words()
  assert '3 of 4 stages finished, one under way or interrupted' in words
  assert 'resumed 2 times' in words
  assert 'stopped early: imagenet_mini' in words
  assert 'interrupted and resumed 2 times, at global step 12,000, 15,0' in words
  assert 'after 12 of 40 epochs (out of patience)' in words
  assert 'imagenet: not finished, 60 of 60 epochs' in words
  assert "Not run, of this config's stages: four, seven" in words
  assert '1 skipped step: first' in words or '1 skipped step:' in words
  assert 'step 30 was not finite' in words
  quiet = read(history_fixture.create_history()).words()
  for word in ('resumed', 'stopped early', 'interrupted', 'not finite'):
    assert word not in quiet


def test_events_lie_where_their_steps_were():
  history, incidents = eventful()
  run = rundir.RunFiles('run', history, incidents=incidents)
  spans = timeline_lib.spans(history['stages'])
  marks = curves.events(run, spans, spans[-1].end)
  found = sorted((mark.x, mark.style) for mark in marks)
  first, second, third, _ = history['stages']
  per_epoch = second['steps_per_epoch']
  begin = first['epochs'][-1]['global_step']
  expected = [
    (20 + 30 / per_epoch, 'incident'),
    (20 + (12_000 - begin) / per_epoch, 'resume'),
    (20 + (15_000 - begin) / per_epoch, 'resume'),
    (50 + 700 / third['steps_per_epoch'], 'incident'),
  ]
  assert [x for _, x in found] == [x for _, x in expected]
  for (at, _), (wanted, _) in zip(found, expected, strict=True):
    assert at == pytest.approx(wanted)


def test_many_incidents_at_one_place_become_one_mark():
  history = history_fixture.create_history()
  incidents = [
    {'kind': 'skipped_step', 'stage': 'imagenet', 'step': i, 'message': f'm{i}'}
    for i in range(500)
  ]
  run = rundir.RunFiles('run', history, incidents=incidents)
  spans = timeline_lib.spans(history['stages'])
  (mark,) = curves.events(run, spans, spans[-1].end)
  assert mark.text.endswith('and 497 more')
  assert 'The last 60 of 500' in read(history, incidents=incidents).words()


def test_names_from_outside_are_escaped():
  history, _ = eventful()
  stage = history['stages'][0]
  stage.update(name=EVIL, dataset=EVIL, description=EVIL, status='running')
  stage['diagnostics'] = diagnose([EVIL] * 10, thumbnail='"><script>')
  stage['transfer'] = {'from': EVIL, 'carried': [EVIL, EVIL], 'fresh': [EVIL]}
  incidents = [
    {'kind': EVIL, 'time': EVIL, 'stage': EVIL, 'step': 3, 'message': EVIL}
  ]
  config = quickstart_config()
  config['stages'][0]['name'] = config['model'] = EVIL
  page = read(
    history, incidents=incidents, config=config, environment=ENVIRONMENT
  )
  assert [tag for tag, _ in page.elements].count('script') == 1
  attributes = {name for _, x in page.elements for name in x}
  assert not any(name.startswith('on') for name in attributes)
  assert page.words().count(EVIL) > 20


def test_an_unreadable_thumbnail_is_a_box_and_a_good_one_an_image():
  history, _ = eventful()
  stage = history['stages'][0]
  page = read(history)
  (image,) = [x for tag, x in page.elements if tag == 'img'][:1]
  assert image['src'] == f'data:image/jpeg;base64,{jpeg()}'
  assert image['alt'] == 'class 0, taken for class 1 with 99% confidence'
  for other in history['stages']:
    if other.get('diagnostics'):
      other['diagnostics']['worst'][0]['thumbnail'] = ''
  assert stage['diagnostics']['worst']
  page = read(history)
  assert not [x for tag, x in page.elements if tag == 'img']
  assert 'no image' in page.words()


def test_sizes_are_those_of_each_phase():
  history = history_fixture.create_history((2,))
  (stage,) = history['stages']
  stage['phases'] = [[1, {'image_size': 256}], [1.5, {'image_size': 288}]]
  assert '224 → 256 → 288 after epoch 1, 1.5 64' in read(history).words()


def test_few_classes_are_listed_and_many_are_counted():
  history, _ = eventful()
  few, many = history['stages'][:2]
  of_few = read({**history, 'stages': [few]}).words()
  of_many = read({**history, 'stages': [many]}).words()
  assert 'Confusion matrix' in of_few
  assert 'Confusion matrix' not in of_many
  assert 'Classes by their accuracy, all 200' in of_many
  assert 'The 10 worst' in of_many
  assert 'Expected calibration error 3.2%' in of_few
  assert 'class 0 class 1 2 10 20.0%' in of_few


def create_row(**values):
  return history_fixture.create_row(1, **values)


@pytest.mark.parametrize(
  'change',
  [
    {'epochs': [], 'best': None},
    {'epochs': [create_row()], 'best': {'epoch': 1, 'top1': 0.5}},
    {'transfer': None},
    {'num_epochs': 0.5, 'epochs': [create_row()]},
    {
      'best': None,
      'epochs': [
        create_row(
          train_loss=math.nan,
          train_top1=None,
          val_loss=None,
          val_top1=None,
          val_top5=None,
          learning_rate=0.0,
          grad_norm=math.inf,
          seconds=None,
          images_per_second=None,
          input_wait=None,
        )
      ],
    },
    {'diagnostics': {}},
    {'diagnostics': {'weights': 'best', 'top1': None}},
    {'step_seconds': [[0.3, 4], [None, 1]]},
    {'handover_seconds': None, 'resumed_at_steps': None, 'rollbacks': None},
    {'best': {'epoch': 1, 'top1': 0.0}},
  ],
)
def test_a_page_is_made_of_whatever_is_there(change):
  history = history_fixture.create_history((3, 2))
  history['stages'][1].update(change)
  page = read(history)
  assert set(SECTIONS) <= set(page.ids())
  assert 'nan' not in page.words().lower().split()
  assert 'inf' not in page.words().lower().split()
  read({**history, 'stages': history['stages'][1:]})


def test_a_page_is_made_of_a_run_that_has_no_stage_yet():
  words = read({'config_hash': '', 'stages': []}).words()
  assert 'No epoch is finished yet.' in words


def test_the_config_is_shown_where_it_is_not_the_default():
  config = quickstart_config()
  words = ' '.join(Reader(overview.config_difference(config)).texts)
  assert 'num_filters 64 16' in words
  # A default, then the four stages.
  assert 'learning_rate 0.001 0.004 0.003 0.05 0.2' in words
  assert 'end_factor 0 0 0 0 0.01' in words
  assert 'momentum' not in words.split()
  assert 'seed' not in words.split()
  assert 'no config.json' in overview.config_difference(None)


def compare(history, model=None):
  run = rundir.RunFiles('run', history, config={'model': model})
  return baselines.compare(run)


def test_baselines_are_of_the_same_data_at_the_nearest_setting():
  history = history_fixture.create_history()
  found = compare(history, 'resnet50')
  imagenette = [x for x in found if x.stage == 'imagenette']
  assert [x.baseline.top1 for x in imagenette] == [(0.935, 0.935)]
  assert imagenette[0].differs == (
    'xresnext50, here resnet50',
    '256 px, here 224 px',
    'tested at 256 px, here at 224 px',
  )
  tiny = [x for x in found if x.stage == 'tiny_imagenet']
  assert [x.baseline.model for x in tiny] == ['resnet50']
  assert tiny[0].differs == (
    '100 epochs, here 30',
    'from scratch, here from an earlier stage',
  )
  ffcv = [x for x in found if 'ffcv' in x.baseline.source]
  assert [x.baseline.num_epochs for x in ffcv] == [56]
  assert 'with flip averaging, here without' in ffcv[0].differs
  for stage in history['stages']:
    stage['eval_flip'] = True
  (ffcv,) = (
    x for x in compare(history, 'resnet50') if 'ffcv' in x.baseline.source
  )
  assert not any('flip averaging' in x for x in ffcv.differs)
  both = compare(history, 'resnet34')
  assert len([x for x in both if x.stage == 'tiny_imagenet']) == 2


@pytest.mark.parametrize(
  ('sizes', 'top1'), [((160, 224), 0.781), ((160, 160), 0.76), ((160,), 0.76)]
)
def test_a_baseline_was_tested_at_the_size_it_is_compared_at(sizes, top1):
  history = history_fixture.create_history()
  stage = history['stages'][-1]
  stage |= dict(zip(('image_size', 'eval_image_size'), sizes, strict=False))
  found = {
    x.baseline.source: x
    for x in compare(history, 'resnet50')
    if x.stage == stage['name']
  }
  a3 = found['timm, ResNet-50 A3']
  assert a3.baseline.top1 == (top1, top1)
  assert a3.baseline[2:4] == (160, sizes[-1])
  assert not any('px' in x for x in a3.differs)
  # Tested larger than trained, as its configs say.
  ffcv = next(x for source, x in found.items() if 'ffcv' in source)
  assert ffcv.baseline[2:4] == (192, 256)
  assert f'tested at 256 px, here at {sizes[-1]} px' in ffcv.differs
  page = read(history, config={**quickstart_config(), 'model': 'resnet50'})
  assert 'tested at' in page.words()


def test_baselines_of_other_classes_or_subsets_are_not_passed_off():
  history = history_fixture.create_history((2,))
  history['stages'][0]['num_train_images'] = 500
  (one,) = compare(history)
  assert '9,469 training images, here 500' in one.differs
  assert 'xresnext50, here an unknown network' in one.differs
  assert not any('evaluation images' in x for x in one.differs)
  history['stages'][0]['num_eval_images'] = 500
  (one,) = compare(history)
  assert '3,925 evaluation images, here 500' in one.differs
  history['stages'][0]['num_classes'] = 3
  assert compare(history) == []
  assert 'None is known for the data' in read(history).words()


def test_speed_is_compared_on_the_same_device_only():
  history = history_fixture.create_history((2,))
  config = {**quickstart_config(), 'model': 'resnet50'}
  words = read(history, config=config, environment=ENVIRONMENT).words()
  assert 'images/s a device, published for A100: 2,470' in words
  # A core of a TPU v3 is a device, of whose chips the speeds are published.
  tpu = {**ENVIRONMENT, 'devices': {'kind': 'TPU v3', 'count': 8}}
  assert 'a device' not in read(history, config=config, environment=tpu).words()
  cpu = {**ENVIRONMENT, 'devices': {'kind': 'cpu', 'count': 1}}
  assert 'a device' not in read(history, config=config, environment=cpu).words()


def test_the_page_refers_to_nothing_outside_itself():
  history, incidents = eventful()
  page = html.page(
    rundir.RunFiles('run', history, quickstart_config(), ENVIRONMENT, incidents)
  )
  references = re.findall(r'(?:src|href)="([^"]*)"', page)
  assert references
  assert all(x.startswith(('#', 'data:')) for x in references)
  assert page.count(SCRIPT) == 1
  page = page.replace(SCRIPT, '')
  assert not re.search(r'url\(|@import|<script|https?://', page)
  assert not re.search(r'fetch|import|https?:|eval', script.SCRIPT)


def test_every_epoch_can_be_taken_away_as_csv():
  history = history_fixture.create_history((3, 2))
  history['stages'][0].update(name='a, "b"\n#%&')
  (link,) = [x for x in read(history).elements if 'download' in x[1]]
  text = parse.unquote(link[1]['href'].partition(',')[2])
  rows = list(csv.DictReader(io.StringIO(text)))
  assert [x['stage'] for x in rows[2:4]] == ['a, "b"\n#%&', 'tiny_imagenet']
  for row, stage in ((rows[1], 0), (rows[4], 1)):
    wanted = history['stages'][stage]['epochs'][1]
    assert float(row['val_loss']) == wanted['val_loss']


def test_a_page_renews_itself_only_while_its_run_goes_on():
  run = rundir.RunFiles('run', history_fixture.create_history((2,)))
  live, over = (Reader(html.page(run, is_live=x)) for x in (True, False))
  assert 'data-live' in live.elements[0][1]
  assert 'renewed every' in live.words()
  assert 'http-equiv' in str(live.elements)
  assert 'data-live' not in over.elements[0][1]
  assert 'http-equiv' not in str(over.elements)


def test_the_loss_says_what_label_smoothing_adds():
  history = history_fixture.create_history((2, 2))
  assert 'smoothing' not in read(history).words()
  history['stages'][1]['label_smoothing'] = 0.1
  assert 'train, includes label smoothing 0.1' in read(history).words()
  history['stages'][0]['loss'] = 'bce'
  assert 'smoothing 0.1, in part binary cross-entropy' in read(history).words()


def test_a_quantile_of_steps_lies_within_its_bin():
  bins = [[1.0, 50], [2.0, 50]]
  assert time_lib.quantile(bins, 0.5) == 1.0
  assert time_lib.quantile(bins, 1.0) == 2.0
  assert time_lib.quantile([[1.0, 100]], 0.5) == pytest.approx(2**-0.125)


def test_few_steps_have_no_quantiles():
  history = history_fixture.create_history((2,))
  history['stages'][0]['step_seconds'] = [[0.5, 19]]
  assert 'Time of a step' not in read(history).words()
  history['stages'][0]['step_seconds'] = [[0.5, 20]]
  assert '95%: 496 ms' in read(history).words()


def contrast(first, second):
  """Returns the contrast of two colours #rrggbb as WCAG 2 defines it."""

  def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
      x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts
    ]
    return sum(map(operator.mul, linear, (0.2126, 0.7152, 0.0722)))

  low, high = sorted(map(luminance, (first, second)))
  return (high + 0.05) / (low + 0.05)


def test_every_colour_of_text_can_be_read_in_light_and_dark():
  # The second definition of each is that of the dark.
  themes = [
    dict(re.findall(r'--([\w-]+): (#\w{6});', part))
    for part in re.split('prefers-color-scheme: dark', style.CSS)
  ]
  assert len(themes) == 2
  # Colours that letters have; others fill bars and draw lines.
  texts = ('ink', 'soft', 'accent', 'train', 'val', 'ema', 'rate', 'warn')
  texts += ('s3', 's4', 's5')
  for own in themes:
    theme = {**themes[0], **own}
    for text, below in itertools.product(texts, ('page', 'card', 'band')):
      assert contrast(theme[text], theme[below]) >= 4.5, (text, below)


def test_a_long_ladder_takes_less_than_three_tenths_of_a_second():
  history, incidents = eventful()
  run = rundir.RunFiles(
    'run', history, quickstart_config(), ENVIRONMENT, incidents
  )
  assert sum(len(stage['epochs']) for stage in run.stages) > 120
  times = []
  for _ in range(5):
    began = time.process_time()
    html.page(run)
    times.append(time.process_time() - began)
  assert min(times) < 0.3


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
  if not chromium.PATH:
    pytest.skip('there is no Chromium on PATH')
  found = chromium.Browser(tmp_path_factory.mktemp('profile'))
  yield found
  found.close()


@pytest.mark.parametrize('width', [1280, 400])
def test_chromium_shows_it_without_errors_network_or_overflow(
  browser, tmp_path, width
):
  history, incidents = eventful()
  run = rundir.RunFiles(
    'run', history, quickstart_config(), ENVIRONMENT, incidents
  )
  path = tmp_path / 'report.html'
  path.write_text(html.page(run), encoding='utf-8')
  browser.open(path, width, dark=width == 400)
  # Folded parts count too.
  browser.evaluate('document.querySelectorAll("details").forEach(x=>x.open=1)')
  assert browser.evaluate('document.documentElement.scrollWidth') <= width
  present = browser.evaluate(
    '[...document.querySelectorAll("section")].map(x=>x.id)'
  )
  assert present == SECTIONS
  heights = browser.evaluate(
    '[...document.querySelectorAll("section")].map(x=>x.offsetHeight)'
  )
  assert min(heights) > 50
  said = browser.events_of(
    'Log.entryAdded', 'Runtime.consoleAPICalled', 'Runtime.exceptionThrown'
  )
  assert said == []
  asked = browser.events_of('Network.requestWillBeSent')
  urls = [x['request']['url'] for x in asked]
  assert [x for x in urls if not x.startswith('data:')] == [
    path.resolve().as_uri()
  ]


def test_chromium_draws_light_and_dark(browser, tmp_path):
  path = tmp_path / 'report.html'
  history = history_fixture.create_history((2,))
  path.write_text(html.page(rundir.RunFiles('run', history)), encoding='utf-8')
  shades = []
  for dark in (False, True):
    browser.open(path, 400, dark=dark)
    shot = browser.screenshot(x=0, y=0, width=400, height=50)
    shades.append(Image.open(io.BytesIO(shot)).convert('L').getpixel((2, 2)))
  assert shades[0] > 240
  assert shades[1] < 40


def write_page(path, history, **arguments):
  history, incidents = history if isinstance(history, tuple) else (history, [])
  run = rundir.RunFiles(
    'run', history, quickstart_config(), ENVIRONMENT, incidents
  )
  path.write_text(html.page(run, **arguments), encoding='utf-8')
  return path


# Texts with what they are drawn on, of which bars below them are no part.
CONTRASTS = """(() => {
  const pen = document.createElement('canvas').getContext('2d',
    {willReadFrequently: true});
  const parse = colour => {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const light = colour => colour.slice(0, 3).map(x => x / 255).map(x =>
    x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4).reduce(
    (sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
  const found = {}, walk = document.createTreeWalker(document.body, 4);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !element.checkVisibility()) continue;
    if (['SCRIPT', 'STYLE', 'title'].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    let below = element;
    while (below && !parse(getComputedStyle(below).backgroundColor)[3])
      below = below.parentElement;
    const colours = [element.tagName === 'text' ? style.fill : style.color,
      below ? getComputedStyle(below).backgroundColor : '#fff'];
    const [low, high] = colours.map(x => light(parse(x))).sort((a, b) => a - b);
    const ratio = (high + .05) / (low + .05);
    if (ratio < 4.5) found[colours] = [ratio, walk.currentNode.data];
  }
  return found;
})()"""


@pytest.mark.parametrize('dark', [False, True])
def test_chromium_shows_all_text_with_contrast(browser, tmp_path, dark):
  browser.open(
    write_page(tmp_path / 'report.html', eventful()), 1280, dark=dark
  )
  browser.evaluate('document.querySelectorAll("details").forEach(x=>x.open=1)')
  assert browser.evaluate(CONTRASTS) == {}


def drag(browser, box, begin, end):
  """Drags the mouse across parts of a box's width."""
  y = box['y'] + box['height'] / 2
  for kind, part in (('Pressed', begin), ('Moved', end), ('Released', end)):
    browser.call(
      'Input.dispatchMouseEvent',
      type=f'mouse{kind}',
      x=box['x'] + part * box['width'],
      y=y,
      button='left',
      clickCount=1,
    )


def test_chromium_zooms_all_charts_of_an_axis(browser, tmp_path):
  history = history_fixture.create_history((20, 20))
  browser.open(write_page(tmp_path / 'report.html', history), 1280)
  views = (
    '[...document.querySelectorAll(".zoom .plot .view")].map(x => '
    '[x.getAttribute("x"), x.getAttribute("width")].map(parseFloat))'
  )
  whole = browser.evaluate(views)
  assert len(whole) == 4
  box = browser.evaluate(
    '(() => { const x = document.querySelector(".plot");'
    'x.scrollIntoView({behavior: "instant"});'
    'return x.getBoundingClientRect().toJSON(); })()'
  )
  drag(browser, box, 0.5, 0.75)
  for x, width in browser.evaluate(views):
    assert (x, width) == pytest.approx((-200, 400), rel=0.02)
  # 20 to 30 of 40 epochs.
  ticks = browser.evaluate(
    '[...document.querySelectorAll(".zoom .axis")[0].querySelectorAll("text")]'
    '.map(x => +x.textContent)'
  )
  assert ticks == [20, 22, 24, 26, 28, 30]
  browser.evaluate(
    'document.querySelector(".plot").dispatchEvent(new MouseEvent("dblclick"))'
  )
  assert all(x[1] == 100 for x in browser.evaluate(views))


def test_chromium_renews_a_page_until_its_run_is_over(
  browser, tmp_path, monkeypatch
):
  monkeypatch.setattr(html, '_RENEWED', 0.2)
  history = history_fixture.create_history((3,))
  history['stages'][0]['status'] = 'running'
  path = write_page(tmp_path / 'report.html', history, is_live=True)
  browser.open(path, 1280)
  browser.evaluate('document.querySelector("details").open = true')
  history['stages'][0]['status'] = 'done'
  is_live = '"live" in document.documentElement.dataset'
  assert browser.evaluate(is_live)
  files.write_bytes(path, write_page(tmp_path / 'new', history).read_bytes())
  while True:
    browser.events.clear()
    if not browser.evaluate(is_live):
      break
    browser.wait_for_load()
  assert '1 of 4 stages finished' in browser.evaluate('document.body.innerText')
  assert browser.evaluate('document.querySelector("details").open')


def test_chromium_renews_no_page_of_a_run_that_has_long_been_silent(
  browser, tmp_path
):
  history = history_fixture.create_history((3,))
  chip = 'document.querySelector(".live").textContent'
  for age, said in ((20, 'renewed every'), (40, 'nothing new for long')):
    when = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=age)
    history['written'] = when.isoformat(timespec='seconds')
    path = write_page(tmp_path / 'report.html', history, is_live=True)
    browser.open(path, 1280)
    assert said in browser.evaluate(chip)


def test_chromium_prints_all_of_it(browser, tmp_path):
  browser.open(write_page(tmp_path / 'report.html', eventful()), 1280)
  browser.call('Emulation.setEmulatedMedia', media='print')
  assert (
    browser.evaluate('getComputedStyle(document.querySelector("nav")).display')
    == 'none'
  )
  # What is folded on the screen as well.
  folded = 'document.querySelector("details:not([open]) table").offsetHeight'
  assert browser.evaluate(folded) > 0
  browser.call('Emulation.setEmulatedMedia', media='')
