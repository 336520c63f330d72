// One image with its mask: looked at, pointed at, one class seen alone.

import { paint, perCent } from "./mask.js";

const find = (id) => document.getElementById(id);
const TIP_GAP = 14;
const WORDS = { waiting: "waiting …", busy: "labelling …" };

export class Stage {
  // `point` is told the label under the pointer, or null; `pick` the label that was clicked.
  constructor(model, palette, { point, pick }) {
    this.palette = palette;
    this.names = ["other", ...model.classes.map((one) => one.short_name)];
    this.colours = ["#808080", ...model.classes.map((one) => one.colour)];
    this.root = find("stage");
    this.tip = find("tip");
    this.item = null;
    this.alone = null;
    this.opacity = 0.6;
    this.root.addEventListener("pointermove", (event) => point(this.pointAt(event)));
    this.root.addEventListener("pointerleave", () => point(this.pointAt(null)));
    this.root.addEventListener("click", (event) => {
      const label = this.labelAt(event);
      if (label !== null) pick(label);
    });
  }

  show(item) {
    this.item = item;
    this.pointAt(null);
    const words = WORDS[item.state];
    find("busy").hidden = !words;
    find("busy").textContent = words || "";
    const picture = find("image");
    const { width, height } = (item.labels ? item : item.bitmap) || { width: 0, height: 0 };
    [picture.width, picture.height] = [width, height]; // which clears it
    if (width) this.root.style.setProperty("--aspect", width / height);
    if (item.bitmap) picture.getContext("2d").drawImage(item.bitmap, 0, 0);
    this.root.classList.toggle("enlarged", width * 2 < this.root.clientWidth);
    this.repaint();
  }

  repaint() {
    const mask = find("mask");
    if (this.item?.labels) paint(mask, this.item, this.palette, this.alone);
    else mask.width = 0;
    // Without a picture below, the mask is all there is to see.
    mask.style.opacity = this.item?.bitmap ? this.opacity : 1;
  }

  setOpacity(opacity) {
    this.opacity = opacity;
    if (this.item?.bitmap) find("mask").style.opacity = opacity;
  }

  labelAt(event) {
    const { item } = this;
    if (!item?.labels) return null;
    const box = this.root.getBoundingClientRect();
    const x = Math.floor(((event.clientX - box.left) / box.width) * item.width);
    const y = Math.floor(((event.clientY - box.top) / box.height) * item.height);
    return x >= 0 && y >= 0 && x < item.width && y < item.height ? item.labels[y * item.width + x] : null;
  }

  // Names what is under the pointer, beside it.
  pointAt(event) {
    const label = event && this.labelAt(event);
    this.tip.hidden = label === null;
    if (label === null) return null;
    const { share } = this.item.classes.find((one) => one.label === label);
    this.tip.replaceChildren(swatch(this.colours[label]), `${this.names[label]} ${perCent(share)}`);
    const box = this.root.getBoundingClientRect();
    const place = (at, size, room) => (at + TIP_GAP + size > room ? Math.max(0, at - TIP_GAP - size) : at + TIP_GAP);
    const left = place(event.clientX - box.left, this.tip.offsetWidth, box.width);
    const top = place(event.clientY - box.top, this.tip.offsetHeight, box.height);
    this.tip.style.transform = `translate(${left}px, ${top}px)`;
    return label;
  }

  // What is seen, at the image's own size.
  picture() {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [this.item.width, this.item.height];
    const context = canvas.getContext("2d");
    if (this.item.bitmap) context.drawImage(this.item.bitmap, 0, 0);
    context.globalAlpha = this.item.bitmap ? this.opacity : 1;
    context.drawImage(find("mask"), 0, 0);
    return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  }
}

export function swatch(colour) {
  const element = document.createElement("span");
  element.className = "swatch";
  element.style.backgroundColor = colour;
  return element;
}
