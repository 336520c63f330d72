// Labels and colours in; what covers the image, and how much of it each class covers, out.

const OUTLINE_LIGHT = 0.45; // as in the pictures of fcn_dist/deploy/pictures.py
const OTHER = [128, 128, 128];
const DIMMED = packed([0, 0, 0], 150); // all but the class that is seen alone

// As a canvas has it in memory: red first, on processors whose lowest byte is first.
function packed([red, green, blue], alpha = 255) {
  return ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}

export function paletteOf(classes) {
  const colours = [OTHER, ...classes.map(({ colour }) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16)))];
  return {
    areas: Uint32Array.from(colours, (colour) => packed(colour)),
    outlines: Uint32Array.from(colours, (colour) => packed(colour.map((part) => Math.round(part * OUTLINE_LIGHT)))),
  };
}

// "other" is not coloured, unless it is what is seen alone.
export function paint(canvas, { labels, width, height }, palette, alone) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const out = new Uint32Array(image.data.buffer);
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++, at++) {
      const label = labels[at];
      if (alone !== null && label !== alone) {
        out[at] = DIMMED;
      } else if (label || alone === 0) {
        const outline =
          (x > 0 && labels[at - 1] !== label) ||
          (y > 0 && labels[at - width] !== label) ||
          (x + 1 < width && labels[at + 1] === 0 && label) ||
          (y + 1 < height && labels[at + width] === 0 && label);
        out[at] = (outline ? palette.outlines : palette.areas)[label];
      }
    }
  }
  context.putImageData(image, 0, 0);
}

// As the server's JSON has them: the largest first.
export function classesOf(labels, classes) {
  const counts = new Array(256).fill(0);
  for (const label of labels) counts[label]++;
  const found = counts.map((pixels, label) => ({
    label,
    name: label ? classes[label - 1]?.name : "other",
    pixels,
    share: pixels / labels.length,
  }));
  return found.filter(({ pixels }) => pixels).sort((one, other) => other.pixels - one.pixels || one.label - other.label);
}

export function perCent(share) {
  return share < 0.0005 ? "<0.1 %" : `${(100 * share).toFixed(1)} %`;
}
