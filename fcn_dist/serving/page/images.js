// Files in; labelled images out, one after the other.

import { classesOf } from "./mask.js";
import { readGray } from "./png.js";

const MOST_TRIES = 30;
const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));

// What the strip holds: `state` is waiting, busy, done or failed.
export function newImage(file) {
  const name = file.name || "pasted.png";
  return { file, name, state: "waiting", message: "", bitmap: null, labels: null, png: null, classes: [] };
}

export async function load(item) {
  // Turned upright by its EXIF orientation, as the server does. Some kinds of images are no browser's.
  item.bitmap = await createImageBitmap(item.file).catch(() => null);
}

export async function label(item, model) {
  item.state = "busy";
  try {
    if (item.file.size > model.max_bytes) {
      throw new Error(`${item.name} has ${item.file.size} bytes; at most ${model.max_bytes} are needed; shrink it`);
    }
    item.png = await asked(item);
    const { width, height, values } = await readGray(item.png);
    Object.assign(item, { width, height, labels: values, classes: classesOf(values, model.classes), state: "done" });
    // A picture that the browser sees in another shape would not lie under its mask.
    if (item.bitmap && (item.bitmap.width !== width || item.bitmap.height !== height)) item.bitmap = null;
    if (!item.bitmap) item.message = "This browser cannot show the image itself; here is its mask.";
  } catch (error) {
    Object.assign(item, { state: "failed", message: error.message });
  }
}

async function asked(item) {
  for (let tries = 1; ; tries++) {
    const body = new FormData();
    body.append("file", item.file, item.name);
    const answer = await fetch("/predict?format=png", { method: "POST", body }).catch(() => null);
    if (!answer) throw new Error("The server does not answer; look whether it still runs, and choose the image again.");
    if (answer.ok) return answer.blob();
    const wait = Number(answer.headers.get("Retry-After"));
    if (!wait || tries === MOST_TRIES) {
      const { detail } = await answer.json().catch(() => ({}));
      throw new Error(detail || `The server answered ${answer.status}.`);
    }
    await pause(wait);
  }
}
