"""How the report looks and the few lines that let a reader pause it."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbf9; --card: #ffffff; --ink: #1b1f24; --soft: #59616b; --line: #e3e4e0; --accent: #0b7468; --wash: #d9efeb;
  --truth: #3a55b4; --control: #96540a; --miss: #a8321f;
  --s0: #0b7468; --s1: #c2571a; --s2: #3a55b4; --s3: #97307c; --s4: #6b7a12; --s5: #59616b;
  --size: 160px;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Helvetica Neue", Arial, sans-serif;
}
@media (prefers-color-scheme: dark) { :root {
  --page: #111417; --card: #191d21; --ink: #e9ebea; --soft: #a2abb3; --line: #2c3237; --accent: #55d0bd; --wash: #17433d;
  --truth: #9db1ff; --control: #f0b465; --miss: #ff9a86;
  --s0: #55d0bd; --s1: #ff9d63; --s2: #9db1ff; --s3: #e990d0; --s4: #c5d35c; --s5: #a2abb3;
} }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 1rem; -webkit-text-size-adjust: 100%; }
body { margin: 0; overflow-wrap: break-word; background: var(--page); color: var(--ink); }
header, main { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 52px; }
main { padding-bottom: 128px; }
h1 { font-size: clamp(1.9rem, 4.4vw, 2.7rem); line-height: 1.12; letter-spacing: -.025em; font-weight: 680; margin: 0 0 14px;
  text-wrap: balance; }
h2 { font-size: 1.6rem; line-height: 1.2; letter-spacing: -.015em; font-weight: 650; margin: 0 0 12px; }
h3 { font-size: 1rem; font-weight: 600; margin: 0; }
p { margin: 0; }
ul, ol { list-style: none; margin: 0; padding: 0; }
a { color: inherit; }
section { margin-top: 88px; }
.subtitle { font-size: 1.15rem; color: var(--soft); max-width: 50em; text-wrap: pretty; }
.text { max-width: 46em; margin-bottom: 12px; }
.quiet, .note { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; margin-top: 24px; font-size: .95rem; }
nav a { color: var(--accent); text-decoration: none; padding: 4px 0; }
nav a:hover { text-decoration: underline; text-underline-offset: 4px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; border-radius: 4px; }

.picture { margin: 0; }
.picture img { display: block; width: var(--size); object-fit: cover; border-radius: 14px; background: var(--line); cursor: pointer;
  outline: 1px solid rgb(128 128 128 / .22); outline-offset: -1px; }
.pixels .picture img { image-rendering: pixelated; }
.pictures { display: flex; flex-wrap: wrap; gap: 16px; }
.kind { display: flex; align-items: baseline; gap: 7px; font-size: .85rem; line-height: 1.35; font-weight: 400; }
.picture .kind { margin-top: 8px; max-width: var(--size); }
.kind::before { content: ""; flex: none; width: 9px; height: 9px; border-radius: 50%; background: var(--soft); }
.kind.generated { color: var(--accent); font-weight: 650; }
.kind.generated::before { background: var(--accent); }
.kind.truth::before { background: none; border: 2px solid var(--truth); }
.kind.control::before { background: none; border: 2px dotted var(--control); border-radius: 2px; }
.kinds { display: flex; flex-wrap: wrap; gap: 6px 28px; margin-top: 40px; font-size: .85rem; color: var(--soft); }
.kinds li { display: flex; gap: 6px; }
.kinds .kind { font-weight: 600; color: var(--ink); }
.kinds .generated { color: var(--accent); }

.opening { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 32px 20px; margin-top: 36px; }
.opening .row { margin: 0; }
.opening .about { margin-bottom: 8px; }
.opening .note { font-size: .85rem; }
.opening .picture { width: 100%; }
.opening .picture img { width: 100%; border-radius: 18px; }

.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 16px; margin-top: 44px; }
.cards > li { background: var(--card); border: 1px solid var(--line); border-radius: 20px; padding: 20px; font-size: .87rem; }
.cards h3 { font-size: .95rem; }
.value { font-size: 2.4rem; line-height: 1.2; font-weight: 680; letter-spacing: -.03em; font-variant-numeric: tabular-nums;
  margin-top: 4px; }
.reached, .missed { font-weight: 600; }
.reached b { color: var(--accent); }
.missed b { color: var(--miss); }
.cards ul { color: var(--soft); margin-top: 4px; }
.cards ul b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.track { position: relative; height: 8px; border-radius: 4px; background: var(--line); margin: 12px 0 14px; }
.track i { position: absolute; top: 0; height: 8px; }
.fill { left: 0; background: var(--accent); border-radius: 4px; }
.track .target { width: 2px; margin-left: -1px; top: -5px; height: 18px; background: var(--ink); }
.track .chance { width: 8px; margin-left: -4px; border-radius: 50%; background: var(--card); border: 2px solid var(--control); }

.row { margin-top: 32px; break-inside: avoid; }
.about { display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline; margin-bottom: 12px; }

.scroll { overflow-x: auto; margin-top: 20px; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: 8px; }
th, td { text-align: left; vertical-align: top; padding: 9px 20px 9px 0; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 500; }
tbody th { font-weight: 600; }
.scores td { min-width: 128px; }
.scores td:nth-child(2) { font-weight: 700; }
td.bar { background: linear-gradient(var(--control) 0 0) left bottom 6px / calc(var(--share) * .86) 3px no-repeat; padding-bottom: 14px; }
td.bar:nth-child(2) { background-image: linear-gradient(var(--accent) 0 0); }
.facts { width: 100%; }
.facts td { overflow-wrap: anywhere; }

.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 24px; }
.curve { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 20px; padding: 20px; break-inside: avoid; }
.curve svg { display: block; width: 100%; max-width: 720px; height: auto; margin-top: 12px; overflow: visible; }
.curve text { font-size: 13px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.curve path { fill: none; stroke-linejoin: round; stroke-linecap: round; }
.curve .grid { stroke: var(--line); }
.raw { stroke-width: 1; opacity: .3; }
.smooth { stroke-width: 2.2; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: .88rem; margin-top: 6px; }
.legend i { display: inline-block; width: 16px; height: 3px; border-radius: 2px;
  vertical-align: middle; margin-right: 7px; background: currentColor; }
.legend b { font-weight: 600; }
.s0 { stroke: var(--s0); color: var(--s0); } .s1 { stroke: var(--s1); color: var(--s1); } .s2 { stroke: var(--s2); color: var(--s2); }
.s3 { stroke: var(--s3); color: var(--s3); } .s4 { stroke: var(--s4); color: var(--s4); } .s5 { stroke: var(--s5); color: var(--s5); }
circle { fill: currentColor; }

.steps li + li { margin-top: 20px; }
pre { margin: 8px 0 0; padding: 14px 16px; background: var(--card); border: 1px solid var(--line); border-radius: 12px; overflow-x: auto; }
code { font: .88rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; user-select: all; }

.player { position: fixed; right: 20px; bottom: 20px; display: flex; align-items: center; gap: 2px; padding: 6px; border-radius: 999px;
  background: var(--card); border: 1px solid var(--line); box-shadow: 0 6px 24px rgb(0 0 0 / .14); font-size: .88rem; }
.player[hidden] { display: none; }
.player button { font: inherit; color: inherit; background: none; border: 0; border-radius: 999px;
  min-width: 36px; height: 36px; padding: 0 12px; cursor: pointer; }
.player button:hover { background: var(--wash); }
.player button[aria-pressed=true] { background: var(--wash); }
#play { min-width: 76px; background: var(--accent); color: var(--page); font-weight: 600; }
#frame { min-width: 62px; text-align: center; color: var(--soft); font-variant-numeric: tabular-nums; }

@media (max-width: 560px) {
  :root { --size: calc((100vw - 60px) / 3); }
  header, main { padding-left: 18px; padding-right: 18px; }
  header { padding-top: 40px; }
  section { margin-top: 64px; }
  .opening { grid-template-columns: none; gap: 24px; }
  .opening .pictures { flex-wrap: nowrap; }
  .pictures { gap: 12px; }
  .player { right: 50%; transform: translateX(50%); bottom: 12px; }
}
@media print {
  :root { --page: #fff; --size: 116px; }
  .player, nav { display: none; }
  section { margin-top: 32px; }
  .picture img, td.bar, .track i, .kind::before { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

# All clips are animations of one period: setting their times together keeps them in step.
SCRIPT = """
const player = document.getElementById('player'), fps = Number(player.dataset.fps), frames = Number(player.dataset.frames);
const films = () => document.getAnimations(), by = id => document.getElementById(id);
const period = () => films()[0].effect.getTiming().duration;
const frame = () => Math.min(frames - 1, Math.floor((films()[0].currentTime % period()) * fps / 1000 + 1e-6));
let playing = true;
function play(on) {
  playing = on;
  films().forEach(film => on ? film.play() : film.pause());
  by('play').textContent = on ? 'Pause' : 'Play';
}
function step(by) {
  const next = (frame() + by + frames) % frames;
  play(false);
  films().forEach(film => { film.currentTime = (next + .5) * 1000 / fps; });
}
function show() {
  const now = `${frame() + 1} / ${frames}`;
  if (by('frame').textContent !== now) by('frame').textContent = now;
  requestAnimationFrame(show);
}
if (films().length) {
  player.hidden = false;
  by('play').onclick = () => play(!playing);
  by('back').onclick = () => step(-1);
  by('on').onclick = () => step(1);
  by('pixels').onclick = event => event.target.setAttribute('aria-pressed', document.body.classList.toggle('pixels'));
  document.querySelectorAll('.picture img').forEach(image => { image.onclick = () => play(!playing); });
  show();
}
"""
