// An 8-bit gray PNG in, its bytes out. The browser's own way leads over a canvas, and some browsers, for the sake of
// privacy, add noise to what is read back from one.

const GRAY = 0;

export async function readGray(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  const view = new DataView(bytes.buffer);
  const compressed = [];
  let width = 0;
  let height = 0;
  for (let at = 8; at < bytes.length; ) {
    const length = view.getUint32(at);
    const kind = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    if (kind === "IHDR") {
      [width, height] = [view.getUint32(at + 8), view.getUint32(at + 12)];
      const [depth, colours, , , interlaced] = bytes.subarray(at + 16, at + 21);
      if (depth !== 8 || colours !== GRAY || interlaced) throw new Error("no 8-bit gray PNG");
    } else if (kind === "IDAT") {
      compressed.push(bytes.subarray(at + 8, at + 8 + length));
    }
    at += length + 12;
  }
  const inflated = new Blob(compressed).stream().pipeThrough(new DecompressionStream("deflate"));
  const rows = new Uint8Array(await new Response(inflated).arrayBuffer());
  return { width, height, values: unfiltered(rows, width, height) };
}

// PNG specification, section 9: each row begins with the number of its filter.
function unfiltered(rows, width, height) {
  const values = new Uint8Array(width * height);
  for (let y = 0; y < height; y++) {
    const from = y * (width + 1);
    const to = y * width;
    const filter = rows[from];
    for (let x = 0; x < width; x++) {
      const left = x ? values[to + x - 1] : 0;
      const above = y ? values[to + x - width] : 0;
      const corner = x && y ? values[to + x - width - 1] : 0;
      values[to + x] = rows[from + 1 + x] + predicted(filter, left, above, corner);
    }
  }
  return values;
}

function predicted(filter, left, above, corner) {
  if (filter === 0) return 0;
  if (filter === 1) return left;
  if (filter === 2) return above;
  if (filter === 3) return (left + above) >> 1;
  const [toLeft, toAbove, toCorner] = [above - corner, left - corner, left + above - 2 * corner].map(Math.abs);
  if (toLeft <= toAbove && toLeft <= toCorner) return left;
  return toAbove <= toCorner ? above : corner;
}
