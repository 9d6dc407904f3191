// All clips are CSS animations of one period: setting their times together keeps them in step.
const element = id => document.getElementById(id), animations = () => document.getAnimations();
const player = element('player'), fps = Number(player.dataset.fps), frames = Number(player.dataset.frames);
const period = () => animations()[0].effect.getTiming().duration;
const frame = () => Math.min(frames - 1, Math.floor((animations()[0].currentTime % period()) * fps / 1000 + 1e-6));
let playing = true;
function play(on) {
  playing = on;
  animations().forEach(each => on ? each.play() : each.pause());
  element('play').textContent = on ? 'Pause' : 'Play';
}
function step(count) {
  const next = (frame() + count + frames) % frames;
  play(false);
  animations().forEach(each => { each.currentTime = (next + .5) * 1000 / fps; });
}
function updateCounter() {
  const text = `${frame() + 1} / ${frames}`;
  if (element('frame').textContent !== text) element('frame').textContent = text;
  requestAnimationFrame(updateCounter);
}
if (animations().length) {
  player.hidden = false;
  element('play').onclick = () => play(!playing);
  element('back').onclick = () => step(-1);
  element('on').onclick = () => step(1);
  element('pixels').onclick = event => event.target.setAttribute('aria-pressed', document.body.classList.toggle('pixels'));
  document.querySelectorAll('.picture img').forEach(image => { image.onclick = () => play(!playing); });
  updateCounter();
}
