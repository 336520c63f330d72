// The page: images come in, are labelled and looked at, and go out as files.

import { decode, label, newImage } from "./images.js";
import { paletteOf, perCent } from "./mask.js";
import { Stage, swatch } from "./stage.js";
import { drawThumbnail, newEntry, showEntry } from "./strip.js";

const MOST_KNOWN = 30; // classes named before there is an image
const find = (id) => document.getElementById(id);
const model = await (await fetch("/model")).json();
const shortName = (number) => (number ? model.classes[number - 1].short_name : "other");
const palette = paletteOf(model.classes);
const stage = new Stage(model, palette, { point: mark, pick: isolate });
const images = [];
let current = null;
let working = false;

function add(files) {
  const added = [...files].map(newImage);
  for (const item of added) {
    item.entry = newEntry(item, () => select(item));
    find("strip").append(item.entry);
  }
  images.push(...added);
  if (added.length) select(added[0]);
  work();
}

async function work() {
  if (working) return;
  working = true;
  for (let item; (item = images.find(({ state }) => state === "waiting")); ) {
    await process(item).catch(({ message }) => update(item, { state: "failed", message }));
  }
  working = false;
}

async function process(item) {
  update(item, { state: "busy" });
  await load(item);
  update(item, await label(item, model));
  drawThumbnail(item, palette);
}

function update(item, news) {
  Object.assign(item, news);
  showEntry(item);
  if (item === current) refresh();
}

// Once, when the image is first selected or worked on.
function load(item) {
  item.loaded ??= decode(item.file).then((bitmap) => {
    if (item.removal.signal.aborted) return bitmap?.close();
    item.bitmap = bitmap;
    drawThumbnail(item, palette);
    if (item === current) refresh();
  });
  return item.loaded;
}

function select(item) {
  current = item;
  stage.alone = null;
  for (const one of images) one.entry.firstChild.setAttribute("aria-current", one === item);
  item?.entry.scrollIntoView({ block: "nearest", inline: "nearest" });
  refresh();
  if (item) load(item);
}

function refresh() {
  document.body.classList.toggle("empty", !images.length);
  find("strip").hidden = !images.length;
  const failed = current?.state === "failed";
  find("bench").hidden = !current;
  find("bench").classList.toggle("failed", failed);
  const message = current?.message || "";
  if (find("message").textContent !== message) find("message").textContent = message;
  find("message").hidden = !message;
  if (!current || failed) return;
  find("caption").textContent = current.labels
    ? `${current.name}, ${current.width} × ${current.height}`
    : current.name;
  for (const id of ["save-overlay", "save-labels", "save-json"]) find(id).disabled = !current.labels;
  stage.show(current);
  listClasses();
  const said = current.classes.slice(0, 5).map((one) => `${shortName(one.label)} ${perCent(one.share)}`);
  find("stage").setAttribute("aria-label", `${current.name}: ${said.join(", ") || "not labelled yet"}`);
  if (current.labels) find("status").textContent = `${current.name}, ${current.classes.length} classes: ${said.join(", ")}`;
}

function listClasses() {
  const entries = current.classes.map((one) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = one.name;
    button.dataset.label = one.label;
    button.setAttribute("aria-pressed", stage.alone === one.label);
    const colour = one.label ? model.classes[one.label - 1].colour : "#808080";
    button.append(swatch(colour), text("name", shortName(one.label)), text("share", perCent(one.share)));
    button.addEventListener("click", () => isolate(one.label));
    const entry = document.createElement("li");
    entry.append(button);
    return entry;
  });
  find("legend").replaceChildren(...entries);
}

function text(className, content) {
  const element = document.createElement("span");
  element.className = className;
  element.textContent = content;
  return element;
}

const legendButtons = () => find("legend").querySelectorAll("button");

function mark(number) {
  for (const button of legendButtons()) button.classList.toggle("under", Number(button.dataset.label) === number);
}

function isolate(number) {
  stage.alone = number === stage.alone ? null : number;
  stage.repaint();
  for (const button of legendButtons()) {
    button.setAttribute("aria-pressed", Number(button.dataset.label) === stage.alone);
  }
  find("status").textContent = stage.alone === null ? "All classes" : `${shortName(stage.alone)} alone`;
}

function go(steps) {
  const next = images[images.indexOf(current) + steps];
  if (!next) return;
  const inStrip = find("strip").contains(document.activeElement);
  select(next);
  if (inStrip) next.entry.firstChild.focus();
}

function remove() {
  const at = images.indexOf(current);
  images.splice(at, 1);
  current.removal.abort();
  current.entry.remove();
  current.bitmap?.close();
  current.bitmap = null;
  select(images[at] || images[at - 1] || null);
  (current ? current.entry.firstChild : find("files")).focus();
}

function save(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

const stem = () => current.name.replace(/\.[^.]*$/, "");

function figures() {
  const { name, width, height, classes } = current;
  return JSON.stringify({ image: name, width, height, model: model.model, classes }, null, 1) + "\n";
}

find("save-overlay").addEventListener("click", async () => save(`${stem()}_overlay.png`, await stage.picture()));
find("save-labels").addEventListener("click", () => save(`${stem()}_labels.png`, current.png));
find("save-json").addEventListener("click", () =>
  save(`${stem()}.json`, new Blob([figures()], { type: "application/json" })),
);
find("remove").addEventListener("click", remove);
find("files").addEventListener("change", ({ target }) => {
  add(target.files);
  target.value = ""; // so that the same file can be chosen again
});
find("opacity").addEventListener("input", ({ target }) => {
  find("percent").textContent = `${target.value} %`;
  stage.setOpacity(target.value / 100);
});
addEventListener("paste", (event) => add(event.clipboardData.files));
addEventListener("dragover", (event) => {
  event.preventDefault();
  find("drop").hidden = !event.dataTransfer.types.includes("Files");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) find("drop").hidden = true;
});
addEventListener("drop", (event) => {
  event.preventDefault();
  find("drop").hidden = true;
  add(event.dataTransfer.files);
});
addEventListener("keydown", (event) => {
  if (event.target.type === "range" || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "ArrowLeft") go(-1);
  else if (event.key === "ArrowRight") go(1);
  else if (event.key === "Delete" && current && !event.repeat) remove();
  else if (event.key === "Escape" && stage.alone !== null) isolate(stage.alone);
});

document.title = `${model.model} - fcn-dist`;
find("model").textContent = model.model;
const known = model.classes.map((one) => one.short_name);
const more = known.length > MOST_KNOWN ? ` and ${known.length - MOST_KNOWN} more` : "";
find("known").textContent = `It knows: ${known.slice(0, MOST_KNOWN).join(", ")}${more}.`;
find("facts").textContent = `${model.classes.length} classes, on ${model.device} in ${model.precision}`;
refresh();
