// The row of images: a button each, with a small picture, its name and how far it is.

import { paint } from "./mask.js";

const WIDTH = 168;
const HEIGHT = 120;
const WORDS = { waiting: "waits", busy: "is being labelled", done: "labelled", failed: "failed" };

export function newEntry(item, choose) {
  const [entry, button] = ["li", "button"].map((name) => document.createElement(name));
  const [picture, name] = ["canvas", "span"].map((tag) => document.createElement(tag));
  [picture.width, picture.height] = [WIDTH, HEIGHT];
  button.type = "button";
  button.append(picture, name);
  button.addEventListener("click", choose);
  entry.append(button);
  item.entry = entry;
  showEntry(item);
  return entry;
}

export function showEntry({ entry, name, state }) {
  const button = entry.firstChild;
  button.className = state;
  button.title = name;
  button.setAttribute("aria-label", `${name}, ${WORDS[state]}`);
  button.lastChild.textContent = state === "failed" ? `⚠ ${name}` : name;
}

// Of the image, or of its mask where that is all there is to see.
export function drawThumbnail(item, palette) {
  const source = item.bitmap || (item.labels && maskOf(item, palette));
  if (!source) return;
  const scale = Math.max(WIDTH / source.width, HEIGHT / source.height);
  const [width, height] = [source.width * scale, source.height * scale];
  const context = item.entry.querySelector("canvas").getContext("2d");
  context.clearRect(0, 0, WIDTH, HEIGHT);
  context.drawImage(source, (WIDTH - width) / 2, (HEIGHT - height) / 2, width, height);
}

function maskOf(item, palette) {
  const canvas = document.createElement("canvas");
  paint(canvas, item, palette, null);
  return canvas;
}
