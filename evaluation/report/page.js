// All clips are animations of one period: setting their times together keeps them in step.
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
