// The classes with their counts, and the tables of detections.

const MOST_ROWS = 300;

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** List every detected class with a check box and the count of shown detections, of each model. */
export function showClasses(list, state, listShown, refresh) {
  const shown = [...state.results.keys()].map((name) => listShown(name));
  const classes = new Map();
  for (const result of state.results.values()) {
    for (const detection of result.detections) classes.set(detection.class_name, detection.color);
  }
  const focused = list.contains(document.activeElement) ? document.activeElement.value : null;
  list.replaceChildren(...[...classes].sort(([a], [b]) => a.localeCompare(b)).map(([name, color]) => {
    const box = make("input", { type: "checkbox", value: name, checked: !state.hidden.has(name) });
    box.addEventListener("input", () => {
      state.hidden[box.checked ? "delete" : "add"](name);
      refresh();
    });
    const swatch = make("span", { className: "swatch" });
    swatch.style.background = color;
    const counts = shown.map((own) => own.filter((detection) => detection.class_name === name).length);
    const label = make("label", {}, box, swatch, make("span", { className: "name", textContent: name }),
      make("span", { className: "count", textContent: counts.join(" | ") }));
    return make("li", {}, label);
  }));
  if (focused !== null) [...list.querySelectorAll("input")].find((box) => box.value === focused)?.focus();
}

/** A table per model; the name of a row marks its box in the image. */
export function showTables(area, state, listShown, refresh) {
  const focused = area.contains(document.activeElement) ? document.activeElement.dataset.row : null;
  area.replaceChildren(...[...state.results.keys()].map((name) => makeTable(name, state, listShown(name), refresh)));
  if (focused) [...area.querySelectorAll("button")].find((button) => button.dataset.row === focused)?.focus();
}

function makeTable(name, state, detections, refresh) {
  const heads = ["class", "score", "x1", "y1", "x2", "y2"].map((text) => make("th", { scope: "col", textContent: text }));
  const rows = detections.slice(0, MOST_ROWS).map((detection, i) => {
    const isChosen = state.chosen?.detection === detection;
    const button = make("button", { type: "button", textContent: detection.class_name });
    button.dataset.row = `${name} ${i}`;
    button.setAttribute("aria-pressed", isChosen);
    button.addEventListener("click", () => {
      state.chosen = isChosen ? null : { model: name, detection };
      refresh();
    });
    const numbers = [detection.score.toFixed(3), ...detection.box.map((value) => value.toFixed(0))];
    const cells = numbers.map((textContent) => make("td", { textContent }));
    return make("tr", { className: isChosen ? "chosen" : "" }, make("td", {}, button), ...cells);
  });
  const more = detections.length > MOST_ROWS ? `, the best ${MOST_ROWS} of them` : "";
  const caption = make("caption", { textContent: `${name}: ${detections.length} detections${more}` });
  const table = make("table", {}, caption, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows));
  const scroll = make("div", { className: "scroll", tabIndex: 0 }, table);
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", `Detections of ${name}`);
  return scroll;
}
