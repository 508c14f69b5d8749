// Masks in COCO's compressed run-length encoding, drawn into a canvas that covers their bounding box.

const LONGEST = 1024; // pixels of a drawn mask's longer side

/** Decode the lengths of the runs, background first; pixels go column by column. */
export function decodeRuns(text) {
  const runs = [];
  let at = 0;
  while (at < text.length) {
    let value = 0;
    let shift = 0;
    let code;
    do {
      code = text.charCodeAt(at++) - 48;
      value |= (code & 31) << shift;
      shift += 5;
    } while (code & 32);
    if (code & 16 && shift < 32) value |= -1 << shift;
    if (runs.length > 2) value += runs[runs.length - 2];
    runs.push(value);
  }
  return runs;
}

/** Call visit(column, first row, row behind the last) for every piece of a column that the mask covers. */
function visitColumns(runs, height, visit) {
  let start = 0;
  runs.forEach((length, i) => {
    const end = start + length;
    if (i % 2) {
      for (let at = start; at < end; ) {
        const column = Math.floor(at / height);
        const stop = Math.min(end, (column + 1) * height);
        visit(column, at - column * height, stop - column * height);
        at = stop;
      }
    }
    start = end;
  });
}

/** Draw a mask: {canvas, x, y, width, height} in pixels of the image, or null for an empty one. */
export function drawMask(mask, color) {
  const runs = decodeRuns(mask.counts);
  let [left, top, right, bottom] = [Infinity, Infinity, 0, 0];
  visitColumns(runs, mask.size[0], (column, first, last) => {
    left = Math.min(left, column);
    right = Math.max(right, column + 1);
    top = Math.min(top, first);
    bottom = Math.max(bottom, last);
  });
  if (right <= left) return null;
  const step = Math.ceil(Math.max(right - left, bottom - top) / LONGEST);
  const canvas = document.createElement("canvas");
  canvas.width = Math.ceil((right - left) / step);
  canvas.height = Math.ceil((bottom - top) / step);
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  const [red, green, blue] = [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16));
  visitColumns(runs, mask.size[0], (column, first, last) => {
    if ((column - left) % step) return;
    const x = (column - left) / step;
    for (let y = Math.ceil((first - top) / step); y * step + top < last; y++) {
      pixels.data.set([red, green, blue, 115], 4 * (y * canvas.width + x));
    }
  });
  context.putImageData(pixels, 0, 0);
  return { canvas, x: left, y: top, width: canvas.width * step, height: canvas.height * step };
}
