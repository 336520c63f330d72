// Files in; pictures of them and labels out.

import { classesOf } from "./mask.js";
import { readGray } from "./png.js";

const MOST_TRIES = 30;

// What the strip holds: `state` is waiting, busy, done or failed.
export function newImage(file) {
  const name = file.name || "pasted.png";
  const removal = new AbortController();
  return { file, name, removal, state: "waiting", message: "", bitmap: null, labels: null, png: null, classes: [] };
}

// Turned upright by its EXIF orientation, as the server does. Some kinds of images are no browser's: null.
export function decode(file) {
  return createImageBitmap(file).then(onWhite).catch(() => null);
}

// As the server sees what is transparent.
function onWhite(bitmap) {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, bitmap.width, bitmap.height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return canvas.transferToImageBitmap();
}

// What is new of the image, once it is labelled.
export async function label(item, model) {
  if (item.file.size > model.max_bytes) {
    throw new Error(`${item.name} has ${item.file.size} bytes; at most ${model.max_bytes} are needed; shrink it`);
  }
  const png = await asked(item);
  const { width, height, values } = await readGray(png);
  // A picture that the browser sees in another shape would not lie under its mask.
  const bitmap = item.bitmap?.width === width && item.bitmap.height === height ? item.bitmap : null;
  const message = bitmap ? "" : "This browser cannot show the image itself; here is its mask.";
  const classes = classesOf(values, model.classes);
  return { state: "done", message, bitmap, labels: values, png, classes, width, height };
}

async function asked({ file, name, removal: { signal } }) {
  for (let tries = 1; ; tries++) {
    const body = new FormData();
    body.append("file", file, name);
    const answer = await fetch("/predict?format=png", { method: "POST", body, signal }).catch(() => null);
    if (!answer) throw new Error("The server does not answer; look whether it still runs, and choose the image again.");
    if (answer.ok) return answer.blob();
    const wait = Number(answer.headers.get("Retry-After"));
    if (!wait || tries === MOST_TRIES) {
      const { detail } = await answer.json().catch(() => ({}));
      throw new Error(detail || `The server answered ${answer.status}.`);
    }
    await pause(wait, signal);
  }
}

function pause(seconds, signal) {
  return new Promise((resolve) => {
    setTimeout(resolve, 1000 * seconds);
    signal.addEventListener("abort", resolve);
  });
}
