// One question at a time. Answers are kept in the browser after each click, and saved as a file at the end; nothing is sent.
const element = id => document.getElementById(id);
const about = JSON.parse(element('about').textContent), questions = about.questions, key = `study ${about.study} ${about.page}`;
const newSession = () => Array.from(crypto.getRandomValues(new Uint8Array(8)), byte => byte.toString(16).padStart(2, '0')).join('');
const fresh = () => ({ session: newSession(), at: 0, answers: questions.map(() => ({})) });
let state = kept() || fresh();
let urls = [];

function kept() {
  try {
    const found = JSON.parse(localStorage.getItem(key));
    return found && found.answers.length === questions.length ? found : null;
  } catch { return null; }  // a browser that keeps nothing
}
function keep() {
  try { localStorage.setItem(key, JSON.stringify(state)); } catch { /* as above */ }
}
function openSection(section) {
  for (const id of ['start', 'question', 'end']) element(id).hidden = id !== section;
  if (section !== 'question') clear();
  scrollTo(0, 0);
}
function clear() {
  element('media').replaceChildren();
  urls.forEach(URL.revokeObjectURL);
  urls = [];
}
function url(number, type) {
  const text = atob(element(`content-${number}`).textContent);
  urls.push(URL.createObjectURL(new Blob([Uint8Array.from(text, letter => letter.charCodeAt(0))], { type })));
  return urls.at(-1);
}
function figure(number, label, isClip, made) {
  const box = document.createElement('figure'), caption = document.createElement('figcaption');
  const shown = document.createElement(isClip ? 'video' : 'img');
  if (isClip) {
    Object.assign(shown, { loop: true, muted: true, autoplay: true, playsInline: true });
    shown.onerror = () => { element('broken').hidden = false; };
    shown.setAttribute('aria-label', label);
  } else shown.alt = label;
  shown.src = url(number, isClip ? 'video/mp4' : 'image/png');
  caption.textContent = label;
  box.className = made ? 'made' : '';
  box.append(shown, caption);
  element('media').append(box);
}
function choice(asked, answers) {
  const set = document.createElement('fieldset'), legend = document.createElement('legend'), grades = document.createElement('div');
  legend.textContent = asked.text;
  grades.className = 'grades';
  for (const [value, text] of asked.grades) {
    const label = document.createElement('label'), input = document.createElement('input');
    Object.assign(input, { type: 'radio', name: asked.scale, value, checked: answers[asked.scale] === value });
    input.onchange = () => { answers[asked.scale] = value; keep(); };
    label.append(input, text);
    grades.append(label);
  }
  set.append(legend, grades);
  return set;
}
function show(at) {
  openSection('question');
  clear();
  state.at = at;
  keep();
  const question = questions[at], labels = question.clips.length > 1 ? ['clip A', 'clip B'] : ['the clip to judge'];
  element('progress').textContent = `${at + 1} of ${questions.length}`;
  element('bar').style.width = `${100 * (at + 1) / questions.length}%`;
  element('prompt').textContent = question.prompt ? `Text: ${question.prompt}` : '';
  element('prompt').hidden = !question.prompt;
  element('broken').hidden = true;
  figure(question.reference, 'reference', true, false);
  if (question.first !== null) figure(question.first, 'first frame', false, false);
  question.clips.forEach((number, i) => figure(number, labels[i], true, true));
  element('form').replaceChildren(...question.asked.map(asked => choice(asked, state.answers[at])));
  element('back').disabled = at === 0;
}
const isOpen = i => questions[i].asked.some(asked => !(asked.scale in state.answers[i]));
function end() {
  const left = questions.map((_, i) => i).filter(isOpen);
  element('left').textContent = left.length ? `Not fully answered: ${left.map(i => i + 1).join(', ')}. You may save without them.` : 'Every question is answered.';
  element('return').onclick = () => show(left.length ? left[0] : questions.length - 1);
  element('saved').hidden = true;
  openSection('end');
}
function save() {
  const content = { study: about.study, page: about.page, session: state.session, saved: new Date().toISOString(), answers: state.answers };
  const link = document.createElement('a'), address = URL.createObjectURL(new Blob([JSON.stringify(content, null, 1)], { type: 'application/json' }));
  link.href = address;
  link.download = `${about.page}-${state.session.slice(0, 6)}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
  element('saved').hidden = false;
}
element('begin').onclick = () => show(state.at);
element('begin').textContent = state.answers.some(each => Object.keys(each).length) ? 'Go on' : 'Start';
element('back').onclick = () => show(state.at - 1);
element('next').onclick = () => state.at + 1 < questions.length ? show(state.at + 1) : end();
element('again').onclick = () => document.querySelectorAll('video').forEach(video => { video.currentTime = 0; video.play().catch(() => {}); });  // one that was left meanwhile
element('form').onsubmit = event => event.preventDefault();
element('save').onclick = save;
element('anew').onclick = () => {
  if (!confirm('Have you saved the answers? They are removed from this browser.')) return;
  state = fresh();
  keep();
  element('begin').textContent = 'Start';
  openSection('start');
};
