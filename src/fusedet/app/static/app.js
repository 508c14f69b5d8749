// The page: state, controls and what they change. Only an image, tiles and heat maps ask the server.

import { showClasses, showTables } from "./lists.js";
import { HeatControls } from "./heat.js";
import { getBlob, getJson, postImage } from "./server.js";
import { saveJson, savePng } from "./saving.js";
import { Camera, View } from "./view.js";

const find = (id) => document.getElementById(id);
const camera = new Camera();
const state = { models: [], maxBytes: 0, file: null, bitmap: null, results: new Map(), hidden: new Set(), chosen: null };
let views = new Map();
let running = null; // aborts the requests of the image before
let heat;

/** Detections of a model that threshold and classes leave. */
function listShown(name) {
  const threshold = Number(find("threshold").value);
  const all = state.results.get(name)?.detections ?? [];
  return all.filter((detection) => detection.score >= threshold && !state.hidden.has(detection.class_name));
}

function showError(text) {
  find("error").textContent = text ?? "";
  find("error").hidden = !text;
}

const say = (text) => (find("status").textContent = text);
const seconds = (value) => `${value < 10 ? value.toFixed(2) : value.toFixed(0)} s`;

/** Draw everything again; nothing is predicted. */
function refresh() {
  find("threshold-value").textContent = Number(find("threshold").value).toFixed(2);
  const layers = { boxes: find("show-boxes").checked, tags: find("show-tags").checked, masks: find("show-masks").checked };
  const counts = [];
  for (const [name, view] of views) {
    const detections = listShown(name);
    const result = state.results.get(name);
    if (state.chosen && state.chosen.model === name && !detections.includes(state.chosen.detection)) state.chosen = null;
    const chosen = state.chosen?.model === name ? state.chosen.detection : null;
    view.show({ bitmap: state.bitmap, detections, chosen, layers, ...heat.getLayer(name) });
    view.canvas.setAttribute("aria-label", result
      ? `${state.file.name}, ${detections.length} detections shown; the table below lists them`
      : "No detections yet");
    view.time.textContent = result ? describeTime(result.seconds) : "";
    if (result) counts.push(`${views.size > 1 ? `${name}: ` : ""}${detections.length}`);
  }
  if (counts.length) {
    const least = Number(find("threshold").value).toFixed(2);
    say(`${counts.join(", ")} detections with a score of ${least} or more in ${state.file.name}`);
  }
  showClasses(find("classes"), state, listShown, refresh);
  showTables(find("tables"), state, listShown, choose);
  const isReady = state.results.size > 0;
  find("no-classes").hidden = isReady;
  find("class-buttons").hidden = !isReady;
  find("masks-label").hidden = ![...state.results.values()].some((result) => result.detections.some((own) => own.mask));
  for (const id of ["save-json", "save-png"]) find(id).disabled = !isReady;
  find("predict-again").disabled = !state.file;
  heat.setReady(isReady);
}

/** Mark a detection, or none, and show where it is. */
function choose(chosen) {
  state.chosen = chosen;
  if (chosen) camera.reveal(chosen.detection.box);
  refresh();
}

function describeTime({ wait, decode, detect }) {
  const waited = wait > 0.05 ? `, waited ${seconds(wait)}` : "";
  return `${seconds(decode + detect)} (read ${seconds(decode)}, detect ${seconds(detect)}${waited})`;
}

/** Give every detection the color that the first model with its class has. */
function colorDetections(reply) {
  const classes = new Map(state.models.flatMap((model) => model.classes).reverse().map((own) => [own.name, own]));
  for (const detection of reply.detections) {
    const own = classes.get(detection.class_name);
    Object.assign(detection, { color: own.color, textColor: own.text_color });
  }
  return reply;
}

/** Decode the image as the browser does; null where it cannot. */
const decodeHere = (file) => createImageBitmap(file).catch(() => null);

async function predict() {
  running?.abort();
  running = new AbortController();
  const { signal } = running;
  const { file } = state;
  showError(null);
  state.results.clear();
  state.chosen = null;
  heat.clear();
  refresh();
  try {
    if (file.size > state.maxBytes) throw new Error(`${file.name} is larger than ${state.maxBytes / 1e6} MB, the limit of this server.`);
    const early = await decodeHere(file);
    if (signal.aborted) return;
    setBitmap(early, early);
    for (const model of state.models) {
      say(`Predicting with ${model.name} ...`);
      const reply = await (await postImage("predict", file, { model: model.name, ...readTiles() }, signal)).json();
      // the browser cannot show it, or turns it in another way than the model sees it
      if (!state.bitmap || camera.width !== reply.width || camera.height !== reply.height) {
        const preview = await postImage("preview", file, { model: model.name }, signal);
        setBitmap(await createImageBitmap(await preview.blob()), reply);
      }
      if (signal.aborted) return;
      state.results.set(model.name, colorDetections(reply));
      refresh();
    }
  } catch (error) {
    if (error.name === "AbortError" || signal.aborted) return;
    say(state.results.size ? find("status").textContent : "No detections.");
    showError(error.message);
  }
}

function setBitmap(bitmap, size) {
  state.bitmap = bitmap;
  if (bitmap && (size.width !== camera.width || size.height !== camera.height)) {
    camera.reset(size.width, size.height);
    camera.fit();
  }
  refresh();
}

function readTiles() {
  const size = find("tiles").value;
  if (!size) return { tiles: 0 };
  return { tiles: size, overlap: find("overlap").value || null, whole: find("whole").checked };
}

function openFile(file) {
  if (!file) return;
  state.file = file;
  camera.reset(1, 1);
  predict();
}

async function showExamples() {
  const examples = await getJson("examples").catch(() => []);
  for (const { number, name } of examples) {
    const [item, button, image] = ["li", "button", "img"].map((tag) => document.createElement(tag));
    Object.assign(button, { type: "button", title: name });
    Object.assign(image, { src: `examples/${number}/thumbnail`, alt: `Example ${name}`, loading: "lazy" });
    image.addEventListener("error", () => item.remove());
    button.addEventListener("click", async () => {
      try {
        openFile(new File([await getBlob(`examples/${number}`)], name));
      } catch (error) {
        showError(error.message);
      }
    });
    button.append(image);
    item.append(button);
    find("examples").append(item);
  }
  find("example-block").hidden = !examples.length;
}

function listen() {
  find("file").addEventListener("change", (event) => {
    openFile(event.target.files[0]);
    event.target.value = ""; // so that the same file can be chosen again
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dragging");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dragging");
    openFile(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => openFile(event.clipboardData.files[0]));
  for (const id of ["threshold", "show-boxes", "show-tags", "show-masks"]) find(id).addEventListener("input", refresh);
  find("all-classes").addEventListener("click", () => {
    state.hidden.clear();
    refresh();
  });
  find("no-class").addEventListener("click", () => {
    for (const result of state.results.values()) result.detections.forEach((own) => state.hidden.add(own.class_name));
    refresh();
  });
  find("tiles-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (state.file) predict();
  });
  find("save-json").addEventListener("click", () => saveJson(state, Number(find("threshold").value), listShown));
  find("save-png").addEventListener("click", () => {
    savePng(state, camera, views).catch((error) => showError(error.message));
  });
}

async function start() {
  const { models, max_bytes: maxBytes, overlap_limit: overlapLimit } = await getJson("models");
  Object.assign(state, { models, maxBytes });
  find("model-names").textContent = models.map((model) => model.name).join(" beside ");
  document.title = `${models[0].name} · fusedet`;
  find("limit").textContent = `At most ${maxBytes / 1e6} MB. The image stays on this server's machine.`;
  find("views").classList.toggle("compared", models.length > 1);
  for (const model of models) {
    const figure = find("view-template").content.firstElementChild.cloneNode(true);
    find("views").append(figure);
    views.set(model.name, new View(figure, model.name, camera));
  }
  const lowest = Math.min(...models.map((model) => model.lowest_score));
  find("threshold").min = Math.min(lowest, 0.99);
  const [{ tiles }] = models;
  find("tiles").value = tiles.size ?? "";
  find("overlap").max = overlapLimit;
  find("overlap").value = tiles.overlap;
  find("whole").checked = tiles.whole;
  heat = new HeatControls(state, refresh, showError);
  listen();
  refresh();
  openFile(find("file").files[0]); // one that was chosen before the answer
  await showExamples();
}

start().catch((error) => showError(error.message));
