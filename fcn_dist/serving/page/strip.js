// The row of images: a button each, with a small picture, its name and how far it is.

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

export function drawThumbnail({ entry, bitmap }) {
  if (!bitmap) return;
  const scale = Math.max(WIDTH / bitmap.width, HEIGHT / bitmap.height);
  const [width, height] = [bitmap.width * scale, bitmap.height * scale];
  const context = entry.querySelector("canvas").getContext("2d");
  context.drawImage(bitmap, (WIDTH - width) / 2, (HEIGHT - height) / 2, width, height);
}
