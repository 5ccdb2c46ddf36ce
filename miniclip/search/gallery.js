"use strict";
const find = (id) => document.getElementById(id);
const cards = [...document.querySelectorAll(".card")];
const filter = find("filter"), viewer = find("viewer");
const total = cards.length;
let shown = cards, current = 0;

document.querySelector(".tools").hidden = total === 0;

function pictures(count) { return count + (count === 1 ? " picture" : " pictures"); }

function refresh() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  shown = cards.filter((card) => {
    const text = card.querySelector(".folder").textContent + "/" + card.querySelector(".name").textContent;
    const fits = words.every((word) => text.toLowerCase().includes(word));
    card.parentElement.hidden = !fits;
    return fits;
  });
  find("count").value = words.length ? shown.length + " of " + pictures(total) : pictures(total);
  find("none").hidden = shown.length > 0 || !words.length;
  find("none").textContent = "Nothing on this page has \u201c" + filter.value.trim() + "\u201d in its name or folder.";
}

/* The nearest picture in the row above or below. */
function vertical(card, direction) {
  const middle = (box) => box.left + box.width / 2;
  const from = card.getBoundingClientRect();
  let best = null, distance = Infinity;
  for (const other of shown) {
    const box = other.getBoundingClientRect();
    const rows = direction * (box.top - from.top);
    if (rows < 2) continue;
    const away = rows * 4 + Math.abs(middle(box) - middle(from));
    if (away < distance) { best = other; distance = away; }
  }
  return best;
}

function view(index) {
  current = index;
  const card = shown[index], picture = card.querySelector("img");
  find("view-image").src = picture ? picture.src : "";
  find("view-image").alt = picture ? picture.alt : "The file could not be read";
  find("view-name").textContent = card.querySelector(".name").textContent;
  find("view-score").textContent = "Number " + card.querySelector(".rank").textContent + ", score " +
    card.querySelector(".score").textContent;
  find("view-path").textContent = card.dataset.path;
  find("original").href = card.href;
  find("copy").textContent = "Copy its path";
  find("previous").disabled = index === 0;
  find("next").disabled = index === shown.length - 1;
  if (!viewer.open) viewer.showModal();
}

function step(by) {
  const index = current + by;
  if (index >= 0 && index < shown.length) view(index);
}

filter.addEventListener("input", refresh);
cards.forEach((card) => card.addEventListener("click", (event) => {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  view(shown.indexOf(card));
}));
find("previous").addEventListener("click", () => step(-1));
find("next").addEventListener("click", () => step(1));
find("close").addEventListener("click", () => viewer.close());
viewer.addEventListener("close", () => shown[current] && shown[current].focus());
if (navigator.clipboard) {
  find("copy").addEventListener("click", () => navigator.clipboard.writeText(find("view-path").textContent).then(
    () => { find("copy").textContent = "Copied"; },
    () => { find("copy").textContent = "Could not copy"; }));
} else {
  find("copy").hidden = true;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (viewer.open) {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
    return;
  }
  if (event.target === filter) {
    if (event.key === "Escape") { filter.value = ""; refresh(); event.preventDefault(); }
    if (event.key === "ArrowDown" && shown.length) { shown[0].focus(); event.preventDefault(); }
    return;
  }
  if (event.target.name === "q") return;
  if (event.key === "/") { filter.focus(); event.preventDefault(); return; }
  const index = shown.indexOf(event.target);
  if (index < 0) return;
  const target = { ArrowLeft: shown[index - 1], ArrowRight: shown[index + 1], Home: shown[0], End: shown.at(-1),
    ArrowUp: vertical(event.target, -1) || filter, ArrowDown: vertical(event.target, 1) }[event.key];
  if (target) { target.focus(); event.preventDefault(); }
});
refresh();
