"""The script of the pages, which are whole without it: zoom and renewal.

Charts of the same axis zoom together: what lies in `.view` is made wider than
its chart, while its letters keep their size. A page of a run that goes on is
loaded anew, while there may be something new; what is unfolded and what is
zoomed stays.
"""

SCRIPT = """
(() => {
  const kept = {}, page = document.documentElement;
  try {
    Object.assign(kept, JSON.parse(sessionStorage.getItem(location.pathname)));
  } catch {}
  const keep = values => {
    Object.assign(kept, values);
    try {
      sessionStorage.setItem(location.pathname, JSON.stringify(kept));
    } catch {}
  };
  const sorted = (...values) => values.sort((a, b) => a - b);
  const charts = [...document.querySelectorAll('.zoom')];

  const ticks = (from, to) => {
    const size = 10 ** Math.floor(Math.log10((to - from) / 3)), found = [];
    const step = size * ([1, 2, 5].find(x => to - from <= 7 * size * x) || 10);
    for (let i = Math.ceil(from / step); i * step <= to; i++)
      found.push(+(i * step).toPrecision(8));
    return found;
  };

  const zoom = (axis, [from, to]) => {
    for (const chart of charts.filter(x => x.dataset.axis === axis)) {
      const end = +chart.dataset.end, wide = 100 * end / (to - from);
      const begin = -100 * from / (to - from);
      chart.classList.toggle('zoomed', wide > 100);
      for (const view of chart.querySelectorAll('.view')) {
        view.setAttribute('x', begin + '%');
        view.setAttribute('width', wide + '%');
      }
      const names = chart.querySelector('.cut > div');
      if (names) Object.assign(
        names.style, {width: wide + '%', marginLeft: begin + '%'});
      const below = chart.querySelector('.axis .view');
      below.replaceChildren(...ticks(from, to).map(x => {
        const name = document.createElementNS(below.namespaceURI, 'text');
        const at = (x - from) / (to - from);
        name.textContent = x;
        name.setAttribute('x', 100 * x / end + '%');
        name.setAttribute('y', 14);
        name.setAttribute('text-anchor',
          at < .02 ? 'start' : at > .98 ? 'end' : 'middle');
        return name;
      }));
    }
  };

  for (const chart of charts) {
    const plot = chart.querySelector('.plot'), axis = chart.dataset.axis;
    const seen = () => kept[axis] || [0, +chart.dataset.end];
    const part = event => {
      const box = plot.getBoundingClientRect();
      return Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
    };
    let begin = null;
    plot.addEventListener('pointerdown', event => {
      if (event.pointerType !== 'mouse' || event.button) return;
      begin = part(event);
      plot.setPointerCapture(event.pointerId);
      event.preventDefault();
    });
    plot.addEventListener('pointermove', event => {
      if (begin === null) return;
      const [a, b] = sorted(begin, part(event)).map(x => 100 * x + '%');
      plot.style.mask =
        `linear-gradient(90deg, #0005 ${a}, #000 ${a} ${b}, #0005 ${b})`;
    });
    plot.addEventListener('pointerup', event => {
      if (begin === null) return;
      const picked = sorted(begin, part(event)), [from, to] = seen();
      begin = null;
      plot.style.mask = '';
      if (picked[1] - picked[0] < .01) return;
      keep({[axis]: picked.map(x => from + x * (to - from))});
      zoom(axis, kept[axis]);
    });
    plot.addEventListener('dblclick', () => {
      keep({[axis]: null});
      zoom(axis, seen());
    });
    if (kept[axis]) zoom(axis, kept[axis]);
  }

  const folds = [...document.querySelectorAll('details')];
  folds.forEach((fold, i) => {
    if (kept.open) fold.open = kept.open.includes(i);
    fold.addEventListener('toggle', () => keep({
      open: [...folds.keys()].filter(i => folds[i].open)}));
  });
  page.classList.add('scripts');
  const {live, until} = page.dataset;
  if (live && Date.now() > Date.parse(until))
    document.querySelector('.live').textContent = 'nothing new for long';
  else if (live)
    setTimeout(() => location.reload(), 1000 * live);
})();
"""
