// Downloads of what is shown: JSON with the detections, and a PNG of the image with everything drawn on it.

import { paint } from "./view.js";

const MOST_PIXELS = 64e6; // of a PNG: browsers limit canvases

function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

const getStem = (state) => (state.file.name ?? "image").replace(/\.[^.]*$/, "");

export function saveJson(state, threshold, listShown) {
  const [first] = state.results.values();
  const models = [...state.results].map(([name, { seconds }]) => ({
    name,
    seconds,
    detections: listShown(name).map(({ color, textColor, ...detection }) => detection),
  }));
  const content = { image: state.file.name, width: first.width, height: first.height, threshold, models };
  const text = JSON.stringify(content, null, 2);
  download(new Blob([text], { type: "application/json" }), `${getStem(state)}.json`);
}

/** Save the whole image at its own size, the models side by side. */
export async function savePng(state, camera, views) {
  const scale = Math.min(1, Math.sqrt(MOST_PIXELS / (camera.width * camera.height * views.size)));
  const [width, height] = [Math.round(camera.width * scale), Math.round(camera.height * scale)];
  const unit = Math.max(1, (width + height) / 1400);
  const canvas = document.createElement("canvas");
  canvas.width = width * views.size;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const whole = { x: camera.width / 2, y: camera.height / 2, width: camera.width, height: camera.height, scale };
  [...views.values()].forEach((view, i) => {
    context.save();
    context.translate(i * width, 0);
    context.beginPath();
    context.rect(0, 0, width, height);
    context.clip();
    paint(context, view.scene, whole, width, height, unit);
    context.restore();
  });
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  if (!blob) throw new Error("The browser cannot save an image of this size.");
  download(blob, `${getStem(state)}.png`);
}
