// The page. Names of files and words of the user become text of elements, never HTML.

const MOST_LABELS = 8; // shown for a picture
const PAUSE = 250; // ms without typing, before the words are computed

const element = (id) => document.getElementById(id);
const pictures = []; // {file, url, card, embedding}, in the order of their arrival
let model;

// The worker

const worker = new Worker("worker.js", { type: "module" });
const waiting = new Map();
let calls = 0;

function ask(call, input) {
  return new Promise((resolve, reject) => {
    waiting.set(++calls, { resolve, reject });
    worker.postMessage({ id: calls, call, input });
  });
}

worker.onmessage = ({ data: { id, result, error, progress } }) => {
  if (progress !== undefined) return showProgress(progress);
  const { resolve, reject } = waiting.get(id);
  waiting.delete(id);
  if (error === undefined) resolve(result);
  else reject(new Error(error));
};
worker.onerror = (event) => showProblem(`The model can't start: ${event.message || "this browser is too old"}`);

function showProgress(progress) {
  element("progress").value = progress;
  const text = progress < 1 ? `Loading the model: ${Math.floor(100 * progress)} %` : "Preparing the model";
  element("loading-text").textContent = text;
}

function showProblem(text) {
  element("problem").textContent = text;
  element("problem").hidden = !text;
}

// Elements

function make(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

/** A line with words, a number and a bar; share: the bar's part of the whole width. */
function makeAnswer(label, score, share) {
  const line = make("li", "");
  const words = make("div", "answer");
  words.append(make("span", "label", label), make("span", "score", score));
  const bar = make("div", "bar");
  bar.append(make("i", ""));
  bar.firstChild.style.setProperty("--share", `${100 * share}%`);
  line.append(words, bar);
  return line;
}

function makeCard(picture) {
  const { name } = picture.file;
  const card = make("li", "card");
  const frame = make("div", "frame");
  const image = make("img", "");
  image.src = picture.url;
  image.alt = "";
  frame.append(image);
  const title = make("div", "title");
  const file = make("span", "file", name);
  file.title = name;
  const remove = make("button", "remove", "✕");
  remove.type = "button";
  remove.setAttribute("aria-label", `Remove ${name}`);
  remove.onclick = () => removePictures([picture]);
  title.append(file, remove);
  card.append(frame, title, make("ol", "answers"));
  return card;
}

function show(picture, ...answers) {
  picture.card.querySelector(".answers").replaceChildren(...answers);
}

// Pictures

const count = (n) => `${n} picture${n === 1 ? "" : "s"}`;

async function addPictures(files) {
  const added = [...files].filter((file) => file.type.startsWith("image/")).map((file) => ({ file }));
  const others = [...files].filter((file) => !file.type.startsWith("image/"));
  showProblem(others.map((file) => `${file.name} is not a picture.`).join("\n"));
  for (const picture of added) {
    picture.url = URL.createObjectURL(picture.file);
    picture.card = makeCard(picture);
    pictures.push(picture);
    element("pictures").append(picture.card);
  }
  element("clear").hidden = !pictures.length;
  for (const [i, picture] of added.entries()) {
    element("status").textContent = `Reading picture ${i + 1} of ${added.length}`;
    try {
      picture.embedding = await ask("picture", picture.file);
    } catch (error) {
      show(picture, make("li", "unreadable", `Not read: ${error.message}`));
    }
    await answer();
  }
}

function removePictures(removed) {
  for (const picture of removed) {
    URL.revokeObjectURL(picture.url);
    picture.card.remove();
    pictures.splice(pictures.indexOf(picture), 1);
  }
  element("clear").hidden = !pictures.length;
  element("pictures").focus();
  answer();
}

// Answers

let latest = 0; // the number of the last question: answers to earlier ones are dropped

async function answer() {
  const question = ++latest;
  const searching = document.querySelector("[name=task]:checked").value === "search";
  const lines = (searching ? element("query").value : element("labels").value).split("\n").map((line) => line.trim());
  const texts = [...new Set(lines.filter(Boolean))];
  const read = pictures.filter((picture) => picture.embedding);
  if (!read.length || texts.length < (searching ? 1 : 2)) {
    read.forEach((picture) => show(picture));
    return setStatus("");
  }
  try {
    const embeddings = await ask("texts", texts);
    if (question === latest) (searching ? rank : name)(read, texts, embeddings);
  } catch (error) {
    showProblem(error.message);
  }
}

const cosine = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);

/** The probability of each label: the softmax of the scores. */
function name(read, labels, embeddings) {
  for (const picture of pictures) element("pictures").append(picture.card);
  for (const picture of read) {
    const scores = embeddings.map((embedding) => model.scale * cosine(picture.embedding, embedding));
    const largest = Math.max(...scores);
    const powers = scores.map((score) => Math.exp(score - largest));
    const sum = powers.reduce((a, b) => a + b);
    const sorted = labels.map((label, i) => [label, powers[i] / sum]).sort((a, b) => b[1] - a[1]);
    const lines = sorted.slice(0, MOST_LABELS).map(([label, p]) => makeAnswer(label, `${(100 * p).toFixed(2)} %`, p));
    show(picture, ...lines);
    picture.best = sorted[0][0];
  }
  setStatus(read.length === 1 ? `${read[0].file.name}: ${read[0].best}` : `${count(read.length)} named`);
}

/** The pictures in the order of their cosines with the words; bars reach from the lowest to the highest. */
function rank(read, [words], [embedding]) {
  for (const picture of read) picture.score = cosine(picture.embedding, embedding);
  const sorted = [...read].sort((a, b) => b.score - a.score);
  const [highest, lowest] = [sorted[0].score, sorted.at(-1).score];
  sorted.forEach((picture, i) => {
    const share = highest > lowest ? (picture.score - lowest) / (highest - lowest) : 1;
    show(picture, makeAnswer(`Number ${i + 1}`, picture.score.toFixed(4).replace("-", "−"), 0.04 + 0.96 * share));
    element("pictures").append(picture.card);
  });
  setStatus(`Best of ${count(read.length)} for “${words}”: ${sorted[0].file.name}`);
}

function setStatus(text) {
  element("status").textContent = text || (pictures.length ? "" : "No pictures yet");
}

// The self-test

async function test() {
  const [verdict, details] = [element("verdict"), element("stages-details")];
  element("test").disabled = true;
  verdict.className = "verdict";
  verdict.textContent = "Testing";
  try {
    const results = await ask("test");
    const wrong = results.find((result) => !result.passed);
    verdict.classList.add(wrong ? "failed" : "passed");
    verdict.textContent = wrong
      ? `Failed. The first wrong step is ${wrong.name}: its relative error is ${short(wrong.relative)}, ` +
        `the limit ${short(wrong.relativeLimit)}.`
      : `Passed. All ${results.length} steps agree with the Python library.`;
    element("stages").replaceChildren(...results.map(makeRow));
    details.hidden = false;
    details.open = Boolean(wrong);
    document.querySelector("tr.failed")?.scrollIntoView({ block: "nearest" });
  } catch (error) {
    verdict.classList.add("failed");
    verdict.textContent = `Failed: ${error.message}`;
  }
  element("test").disabled = false;
}

const short = (number) => (number ? number.toExponential(1) : String(number));

function makeRow({ name, shape, relative, relativeLimit, passed }) {
  const row = make("tr", passed ? "passed" : "failed");
  const cells = [name, shape.join(" × "), short(relative), short(relativeLimit)];
  row.append(...[...cells, passed ? "agrees" : "wrong"].map((text) => make("td", "", text)));
  return row;
}

// Events

element("files").onchange = ({ target }) => addPictures(target.files).then(() => (target.value = ""));
element("clear").onclick = () => removePictures([...pictures]);
element("test").onclick = test;
element("examples").onclick = async () => {
  const files = model.examples.map(async (path) => {
    const content = await (await fetch(path)).blob();
    return new File([content], path.split("/").at(-1), { type: "image/webp" });
  });
  addPictures(await Promise.all(files));
};

let timer;
for (const id of ["labels", "query"])
  element(id).oninput = () => {
    clearTimeout(timer);
    timer = setTimeout(answer, PAUSE);
  };
for (const radio of document.querySelectorAll("[name=task]"))
  radio.onchange = () => {
    for (const task of ["name", "search"]) element(`${task}-panel`).hidden = task !== radio.value;
    answer();
  };

const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  document.body.classList.remove("dragging");
  if (!holdsFiles(event)) return;
  event.preventDefault();
  addPictures(event.dataTransfer.files);
});
document.addEventListener("paste", ({ clipboardData: { files } }) => files.length && addPictures(files));

showProgress(0);
try {
  model = await ask("load");
  element("examples").disabled = element("test").disabled = false;
  element("model").textContent = `The model is ${model.name}.`;
  element("loading").hidden = true;
  setStatus("");
} catch (error) {
  element("loading").hidden = true;
  showProblem(`The model can't be loaded. ${error.message}`);
}
