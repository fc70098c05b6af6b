"""The style sheet of the reports: for light, dark, telephones and paper."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --card: #f6f7f9; --ink: #1d2430; --soft: #5b6573;
  --rule: #dfe3e8; --band: #f1f3f6; --accent: #0067a3;
  --train: #0072b2; --val: #bd4900; --ema: #00795a; --rate: #4a5361;
  --bar: #4c8fbd; --wait: #d98a00; --eval: #8a63b8; --hand: #8d97a5;
  --warn: #a84300; --most: .75;
  --s3: #7b4fb0; --s4: #806000; --s5: #b03070;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1b212a; --ink: #e8ecf1; --soft: #a2adbb;
    --rule: #323b47; --band: #181e26; --accent: #6db9ec;
    --train: #56b4e9; --val: #ff9a55; --ema: #3fcf9f; --rate: #b9c3d0;
    --bar: #5c9fcb; --wait: #f0b040; --eval: #b795e4; --hand: #7d8896;
    --warn: #ffa366; --most: .45;
  --s3: #b795e4; --s4: #e8c547; --s5: #f08fbd;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 1rem; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: break-word;
}
main, .top, nav { width: min(1080px, 100% - 2rem); margin-inline: auto; }
.top { padding-top: 2.2rem; }
h1 { font-size: 1.9rem; line-height: 1.15; margin: 0; letter-spacing: -.015em; }
h2 {
  font-size: 1.35rem; margin: 3.2rem 0 .8rem; padding-top: 1.1rem;
  border-top: 1px solid var(--rule); letter-spacing: -.01em;
}
section:first-child h2 { border: 0; margin-top: 1.2rem; padding-top: 0; }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .5rem; }
h4 { font-size: .95rem; margin: 1.2rem 0 .4rem; }
p { margin: .5rem 0; max-width: 72ch; }
a { color: var(--accent); text-underline-offset: .15em; }
code { font: .88em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.eyebrow, .note, .axis-label { color: var(--soft); font-size: .87rem; }
.eyebrow { margin: 0 0 .2rem; }
nav ul {
  display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; list-style: none;
  margin: 1.4rem 0 0; padding: .6rem 0; border-block: 1px solid var(--rule);
  font-size: .93rem;
}
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }

.tiles, .cards { display: grid; gap: .9rem; margin: 1.2rem 0; }
.tiles { align-items: baseline; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.cards { grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); }
.tile { padding: .2rem 0; }
.tile b { display: block; font-size: 1.55rem; line-height: 1.2; }
.tile span { color: var(--soft); font-size: .87rem; }
.first { grid-column: span 2; }
.first b { font-size: 2.9rem; letter-spacing: -.03em; line-height: 1.05; }
.card { background: var(--card); border-radius: 10px; padding: 1rem 1.1rem;
  display: grid; grid-template-rows: subgrid; grid-row: span 5; row-gap: 0; }
.card > * { margin: .15rem 0; min-width: 0; }
.card h3 { margin: 0; display: flex; flex-wrap: wrap; gap: 0 .5rem;
  align-items: baseline; justify-content: space-between;
  overflow-wrap: anywhere; }
.card .score { font-size: 1.75rem; font-weight: 650; line-height: 1.3;
  letter-spacing: -.02em; }
.card .score small { font-size: .85rem; font-weight: 400; letter-spacing: 0;
  color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .9rem;
  margin: .6rem 0; }
dt { color: var(--soft); }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
.chip { display: inline-block; font-size: .76rem; font-weight: 600;
  padding: .1rem .55rem; border-radius: 99px; border: 1px solid currentColor;
  white-space: nowrap; color: var(--soft); }
.chips { display: flex; flex-wrap: wrap; gap: .4rem; margin: .6rem 0 0; }
a.chip { text-decoration: none; }
.chip.good { color: var(--ema); }
.chip.warn { color: var(--warn); }

.scroll { overflow-x: auto; max-width: 100%; margin: .8rem 0; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; min-width: 50%; }
caption { text-align: left; color: var(--soft); font-size: .87rem;
  padding-bottom: .3rem; max-width: min(72ch, 100vw - 2rem); }
th, td { padding: .34rem 1.1rem .34rem 0; text-align: left;
  vertical-align: top; border-bottom: 1px solid var(--rule); }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--soft); font-weight: 600; font-size: .83rem;
  white-space: nowrap; vertical-align: bottom; }
tbody th { font-weight: 600; }
.num, .tile b, .score { font-variant-numeric: tabular-nums; }
.num { text-align: right; white-space: nowrap; }
.long { display: inline-block; min-width: 15rem; }
td small { display: block; color: var(--soft); }
td:not(.num) small { min-width: 9rem; }
.same { color: var(--soft); }
.changed { font-weight: 650; }

figure { margin: 1.2rem 0 1.6rem; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; gap: .1rem 1rem;
  align-items: baseline; font-size: .87rem; margin-bottom: .35rem; }
figcaption b { font-size: .95rem; margin-right: auto; }
.entry { color: var(--soft); white-space: nowrap; }
.key { display: inline-block; width: 1.1rem; height: 0; margin-right: .35rem;
  vertical-align: .25em; border-top: 3px solid currentColor; }
.panel { display: grid; grid-template-columns: 44px minmax(0, 1fr);
  column-gap: 8px; }
.axis-label { margin: 0; max-width: none; text-align: right; }
.cut { overflow: hidden; }
.cut > div { display: flex; }
.bands small { font-size: inherit; }
.bands span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  font-size: .78rem; color: var(--soft); padding: 0 2px 2px 3px;
  border-left: 1px solid var(--rule); }
svg { display: block; overflow: visible; }
svg svg { overflow: hidden; }
svg .view { overflow: visible; }
.zoomed .plot, .zoomed .axis { overflow: hidden; }
.scripts .plot { cursor: crosshair; }
.scripted { display: none; }
.scripts .scripted { display: inline; }
svg text { font-size: 12px; fill: var(--soft); font-family: inherit;
  font-variant-numeric: tabular-nums; }
.line { fill: none; stroke: currentColor; stroke-width: 1.8;
  vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.line.chance { stroke-dasharray: 1 4; stroke-linecap: round; }
.key.chance { border-top-style: dotted; }
.whisker { stroke: currentColor; stroke-width: 1.6; opacity: .75; }
.dot, .best { fill: currentColor; }
.best { stroke: var(--page); stroke-width: 1.5; }
.grid { stroke: var(--rule); stroke-width: 1; }
.band { fill: var(--band); }
svg .best-label { fill: currentColor; font-weight: 650; font-size: 12.5px;
  paint-order: stroke; stroke: var(--page); stroke-width: 3px;
  stroke-linejoin: round; }
.mark line { stroke: currentColor; stroke-dasharray: 2 3; opacity: .7; }
svg .mark text { fill: currentColor; font-size: 11px; }
.resume { color: var(--soft); }
.incident { color: var(--warn); }
.hint rect { fill: transparent; }
.hint line { stroke: none; }
.hint:hover line { stroke: var(--soft); stroke-width: 1; }
.train, .s0 { color: var(--train); } .val, .s1 { color: var(--val); }
.ema, .s2 { color: var(--ema); } .rate, .chance { color: var(--rate); }
.s3 { color: var(--s3); } .s4 { color: var(--s4); } .s5 { color: var(--s5); }
.s6 { color: var(--ink); } .s7 { color: var(--soft); }
.line.single { stroke-width: 1; }
.line.unfinished { stroke-dasharray: 6 4; stroke-width: 1.4; }
svg .name { fill: currentColor; }
.named .panel { grid-template-columns: 44px minmax(0, 1fr) 16rem; }
.named .line-of { display: none; }
.switch > input { accent-color: var(--accent); }
.switch > label { margin-right: 1.2rem; white-space: nowrap; }
.switch > .choice { display: none; }
.switch > input:nth-of-type(1):checked ~ .choice:nth-of-type(1),
.switch > input:nth-of-type(2):checked ~ .choice:nth-of-type(2),
.switch > input:nth-of-type(3):checked ~ .choice:nth-of-type(3)
  { display: block; }
.line.train { stroke-dasharray: 5 3; }
.key.train { border-top-style: dashed; }
.bar { fill: var(--bar); }
.stack { border-radius: 4px; overflow: hidden; }
.t-training { color: var(--bar); fill: var(--bar); }
.t-wait { color: var(--wait); fill: var(--wait); }
.t-eval { color: var(--eval); fill: var(--eval); }
.t-hand { color: var(--hand); fill: var(--hand); }
.t-save { color: var(--ema); fill: var(--ema); }
.t-compile { color: var(--val); fill: var(--val); }
.t-rest { color: var(--rule); fill: var(--rule); }
.rows { display: grid; gap: .55rem 1rem; align-items: center;
  grid-template-columns: minmax(0, max-content) minmax(0, 1fr) max-content;
  font-size: .9rem; margin: .6rem 0 1.4rem; }
.rows > span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  max-width: 16rem; }
.range .expected { fill: var(--bar); opacity: .35; }
.range .reference { stroke: var(--ink); stroke-width: 2.5; }
.range .null { stroke-width: 1; stroke-dasharray: 3 3; }
.range .interval { stroke: var(--ink); stroke-width: 2; }
.range .mean { fill: var(--page); stroke: var(--ink); stroke-width: 2; }
.range .shown { fill: var(--ink); }
.range .late { stroke: var(--val); stroke-width: 2.5; }
.entry.late { color: var(--val); }
.range .best { fill: var(--val); }
.pair { display: grid; gap: 0 2.5rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
.small { max-width: 34rem; }
.ideal { stroke: var(--ink); stroke-dasharray: 4 4; }
.heat { min-width: 0; font-variant-numeric: tabular-nums; }
.heat th { border: 0; padding: 0 .5rem 0 0; vertical-align: middle;
  font-weight: 400; white-space: nowrap; }
.heat th span { writing-mode: vertical-rl; padding-top: .4rem;
  transform: rotate(180deg); }
.heat td { width: 1.9rem; min-width: 1.9rem; height: 1.9rem; padding: 0;
  border: 2px solid var(--page); text-align: center; vertical-align: middle; }
.heat .right { --hue: var(--bar); } .heat .wrong { --hue: var(--val); }
.heat td { background: color-mix(in srgb, var(--hue)
  calc(var(--part, 0%) * var(--most)), var(--band)); }
.worst { display: grid; gap: .9rem; list-style: none; padding: 0;
  grid-template-columns: repeat(auto-fill, minmax(7.2rem, 1fr)); }
.worst li { font-size: .8rem; line-height: 1.35; min-width: 0;
  overflow-wrap: anywhere; }
.worst img, .worst .no-image { display: flex; width: 96px; height: 96px;
  object-fit: contain; background: var(--card); border-radius: 6px;
  margin-bottom: .3rem; align-items: center; justify-content: center;
  color: var(--soft); }
details { margin: .9rem 0; }
summary { cursor: pointer; font-weight: 600; padding: .3rem 0; }
summary small { font-weight: 400; color: var(--soft); }
.notes li { margin: .35rem 0; max-width: 76ch; }
footer { color: var(--soft); font-size: .83rem; margin: 4rem 0 2.5rem; }
@media (max-width: 560px) {
  body { font-size: 15px; }
  h1 { font-size: 1.55rem; }
  .first b { font-size: 2.4rem; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .rows { gap: .5rem .6rem; }
  .rows > span:not(.num) { max-width: 6.5rem; white-space: normal; }
  .bands small, .rows .axis text:nth-child(even) { display: none; }
  .panel, .named .panel { grid-template-columns: 34px minmax(0, 1fr);
    column-gap: 6px; }
  .named .beside { display: none; }
  .named .line-of { display: inline; white-space: normal; }
  .facts { grid-template-columns: 1fr; gap: 0; }
  .facts dd { margin-bottom: .4rem; }
  .switch { display: grid; grid-template-columns: auto minmax(0, 1fr); }
  .switch > .choice { grid-column: 1 / -1; }
}
@media print {
  nav, .hint, .scripts .scripted { display: none; }
  body { font-size: 10.5pt; }
  .scroll { overflow: visible; }
  figure, .card, tr, .worst li { break-inside: avoid; }
  h2, h3, h4 { break-after: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
