// An image with its detections on a canvas that zooms and pans; views of one image share a camera.

import { drawMask } from "./masks.js";

const masks = new WeakMap(); // drawn masks by detection

/** The part of the image that all views show: its center in pixels of the image, and screen pixels per pixel. */
export class Camera {
  constructor() {
    this.views = [];
    this.reset(1, 1);
  }

  reset(width, height) {
    Object.assign(this, { width, height, x: width / 2, y: height / 2, scale: 1, fits: true });
  }

  get fitScale() {
    const stage = this.views[0]?.canvas;
    return stage?.clientWidth ? Math.min(stage.clientWidth / this.width, stage.clientHeight / this.height) : 1;
  }

  fit() {
    Object.assign(this, { x: this.width / 2, y: this.height / 2, scale: this.fitScale, fits: true });
    this.redraw();
  }

  /** Zoom by a factor; the point of the image under (dx, dy), measured from the stage's center, stays there. */
  zoom(factor, dx = 0, dy = 0) {
    const scale = Math.min(Math.max(this.scale * factor, Math.min(1, this.fitScale / 2)), Math.max(32, this.fitScale));
    this.x += dx / this.scale - dx / scale;
    this.y += dy / this.scale - dy / scale;
    this.scale = scale;
    this.move(0, 0);
  }

  move(dx, dy) {
    this.x = Math.min(Math.max(this.x - dx / this.scale, 0), this.width);
    this.y = Math.min(Math.max(this.y - dy / this.scale, 0), this.height);
    this.fits = false;
    this.redraw();
  }

  /** Move to a box that is not whole in sight, and zoom out if it is too large. */
  reveal([x1, y1, x2, y2]) {
    const stage = this.views[0].canvas;
    const [dx, dy] = [stage.clientWidth / 2 / this.scale, stage.clientHeight / 2 / this.scale];
    if (x1 >= this.x - dx && x2 <= this.x + dx && y1 >= this.y - dy && y2 <= this.y + dy) return;
    const largest = 0.8 * Math.min(stage.clientWidth / (x2 - x1), stage.clientHeight / (y2 - y1));
    Object.assign(this, { x: (x1 + x2) / 2, y: (y1 + y2) / 2, scale: Math.min(this.scale, largest) });
    this.move(0, 0);
  }

  redraw() {
    for (const view of this.views) view.redraw();
  }
}

/** Draw image, heat map, masks, boxes and tags. */
export function paint(context, scene, camera, width, height, unit) {
  const { bitmap, heat, heatOpacity, detections, chosen, layers } = scene;
  const toX = (x) => (x - camera.x) * camera.scale + width / 2;
  const toY = (y) => (y - camera.y) * camera.scale + height / 2;
  const drawLayer = (layer, x, y, w, h) =>
    context.drawImage(layer, toX(x), toY(y), w * camera.scale, h * camera.scale);
  context.imageSmoothingEnabled = camera.scale < 3;
  if (bitmap) drawLayer(bitmap, 0, 0, camera.width, camera.height);
  if (heat) {
    context.imageSmoothingEnabled = true;
    context.globalAlpha = heatOpacity;
    drawLayer(heat, 0, 0, camera.width, camera.height);
    context.globalAlpha = 1;
  }
  const fade = (detection) => (chosen && detection !== chosen ? 0.25 : 1);
  if (layers.masks) {
    for (const detection of [...detections].reverse()) {
      if (!detection.mask) continue;
      if (!masks.has(detection)) masks.set(detection, drawMask(detection.mask, detection.color));
      const mask = masks.get(detection);
      context.globalAlpha = fade(detection);
      if (mask) drawLayer(mask.canvas, mask.x, mask.y, mask.width, mask.height);
    }
  }
  if (layers.boxes) {
    for (const detection of [...detections].reverse()) {
      const [x1, y1, x2, y2] = detection.box;
      context.globalAlpha = fade(detection);
      for (const [color, line] of [["#0008", 4 * unit], [detection.color, (detection === chosen ? 3.5 : 2) * unit]]) {
        context.strokeStyle = color;
        context.lineWidth = line;
        context.strokeRect(toX(x1), toY(y1), (x2 - x1) * camera.scale, (y2 - y1) * camera.scale);
      }
    }
  }
  context.globalAlpha = 1;
  if (layers.tags) drawTags(context, detections, chosen, { toX, toY, width, height, unit });
}

/** Write names and scores above the boxes, the best first; a tag that would hide another is left out. */
function drawTags(context, detections, chosen, { toX, toY, width, height, unit }) {
  const [size, pad] = [13 * unit, 4 * unit];
  const placed = [];
  context.font = `${size}px system-ui, sans-serif`;
  context.textBaseline = "middle";
  for (const detection of chosen ? [chosen] : detections) {
    const text = `${detection.class_name} ${detection.score.toFixed(2)}`;
    const [w, h] = [context.measureText(text).width + 2 * pad, size + pad];
    const [x1, y1, , y2] = detection.box;
    if (toX(detection.box[2]) < 0 || toX(x1) > width || toY(y2) < 0 || toY(y1) > height) continue;
    const x = Math.min(Math.max(toX(x1), 0), Math.max(0, width - w));
    const places = [toY(y1) - h, toY(y2), toY(y1)].map((y) => Math.min(Math.max(y, 0), height - h));
    const isFree = (y) => !placed.some((p) => p.x < x + w && x < p.x + p.w && p.y < y + h && y < p.y + p.h);
    const y = places.find(isFree);
    if (y === undefined) continue;
    placed.push({ x, y, w, h });
    context.fillStyle = detection.color;
    context.fillRect(x, y, w, h);
    context.fillStyle = detection.textColor;
    context.fillText(text, x + pad, y + h / 2);
  }
}

/** A figure with a canvas, its buttons and its keys. */
export class View {
  constructor(figure, name, camera) {
    this.figure = figure;
    this.canvas = figure.querySelector("canvas");
    this.time = figure.querySelector(".time");
    this.camera = camera;
    this.scene = { bitmap: null, heat: null, heatOpacity: 1, detections: [], chosen: null, layers: {} };
    figure.querySelector(".name").textContent = name;
    camera.views.push(this);
    new ResizeObserver(() => (camera.fits ? camera.fit() : this.redraw())).observe(this.canvas);
    this.listen();
  }

  show(changes) {
    Object.assign(this.scene, changes);
    this.redraw();
  }

  redraw() {
    this.requested ??= requestAnimationFrame(() => {
      this.requested = null;
      this.draw();
    });
  }

  draw() {
    const { canvas, camera } = this;
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    // a finger scrolls the page unless the image is zoomed
    canvas.style.touchAction = camera.fits ? "pan-y" : "none";
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    if (this.scene.bitmap) paint(context, this.scene, camera, width, height, 1);
  }

  listen() {
    const { canvas, camera } = this;
    const pointers = new Map();
    const fromCenter = (event) => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2];
    };
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      camera.zoom(Math.exp(-event.deltaY / 400), ...fromCenter(event));
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, fromCenter(event));
    });
    canvas.addEventListener("pointermove", (event) => {
      const before = pointers.get(event.pointerId);
      if (!before) return;
      const now = fromCenter(event);
      const other = [...pointers].find(([id]) => id !== event.pointerId)?.[1];
      if (other) {
        const distance = (point) => Math.hypot(point[0] - other[0], point[1] - other[1]) || 1;
        camera.zoom(distance(now) / distance(before), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
      } else if (!camera.fits || event.pointerType === "mouse") {
        camera.move(now[0] - before[0], now[1] - before[1]);
      }
      pointers.set(event.pointerId, now);
    });
    for (const kind of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(kind, (event) => pointers.delete(event.pointerId));
    }
    const actions = {
      in: () => camera.zoom(1.5),
      out: () => camera.zoom(1 / 1.5),
      fit: () => camera.fit(),
      full: () => camera.zoom(1 / camera.scale),
    };
    for (const button of this.figure.querySelectorAll("[data-do]")) {
      button.addEventListener("click", actions[button.dataset.do]);
    }
    const keys = {
      "+": actions.in, "=": actions.in, "-": actions.out, 0: actions.fit, 1: actions.full,
      ArrowLeft: () => camera.move(60, 0), ArrowRight: () => camera.move(-60, 0),
      ArrowUp: () => camera.move(0, 60), ArrowDown: () => camera.move(0, -60),
    };
    canvas.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
      event.preventDefault();
      keys[event.key]();
    });
  }
}
