// Heat maps: which features of which level contribute to a class. They are computed on request only.

import { postImage } from "./server.js";

const find = (id) => document.getElementById(id);

async function decodeLayer(png) {
  const bytes = Uint8Array.from(atob(png), (character) => character.charCodeAt(0));
  return createImageBitmap(new Blob([bytes], { type: "image/png" }));
}

function setOptions(select, texts, preferred) {
  const before = texts.includes(select.value) ? select.value : preferred ?? texts.at(-1);
  select.replaceChildren(...texts.map((text) => new Option(text)));
  if (texts.length) select.value = before;
}

export class HeatControls {
  constructor(state, refresh, showError) {
    Object.assign(this, { state, refresh, showError, maps: new Map() });
    this.models = state.models.filter((model) => model.heat_maps);
    if (!this.models.length) {
      find("heat-hint").textContent = "An exported model shows no layers: serve the run that it is from to see heat maps.";
      find("heat-fields").hidden = true;
    }
    find("heat-button").addEventListener("click", () => this.compute());
    find("heat-row").addEventListener("input", () => this.showLevels());
    for (const id of ["heat-level", "heat-opacity"]) find(id).addEventListener("input", refresh);
    find("heat-clear").addEventListener("click", () => {
      this.clear();
      refresh();
    });
  }

  clear() {
    this.maps.clear();
    find("heat-result").hidden = true;
  }

  /** Offer the classes, the detected ones first. */
  setReady(isReady) {
    find("heat-button").disabled = !isReady || this.isComputing;
    if (!isReady) return;
    const results = this.models.map((model) => this.state.results.get(model.name)).filter(Boolean);
    const detected = results.flatMap((result) => result.detections).sort((a, b) => b.score - a.score);
    const known = this.models.flatMap((model) => model.classes.map((own) => own.name));
    const names = [...new Set([...detected.map((own) => own.class_name), ...known])];
    setOptions(find("heat-class"), names, names[0]);
  }

  async compute() {
    const { file } = this.state;
    const parameters = { class: find("heat-class").value, kind: find("heat-kind").value };
    this.clear();
    this.showError(null);
    this.isComputing = true;
    find("heat-button").disabled = true;
    find("heat-button").textContent = "Computing ...";
    try {
      for (const model of this.models) {
        if (!model.classes.some((own) => own.name === parameters.class)) continue;
        const reply = await (await postImage("heatmaps", file, { ...parameters, model: model.name })).json();
        const rows = new Map();
        for (const row of reply.rows) {
          const layers = await Promise.all(row.maps.map(async (map) => [map.level, await decodeLayer(map.png)]));
          rows.set(row.caption, new Map(layers));
        }
        if (file !== this.state.file) return; // another image was chosen meanwhile
        this.maps.set(model.name, rows);
        setOptions(find("heat-kind"), reply.kinds);
        find("heat-unit").textContent = `Bright: ${reply.unit}.`;
      }
      setOptions(find("heat-row"), [...new Set([...this.maps.values()].flatMap((rows) => [...rows.keys()]))]);
      this.showLevels();
    } catch (error) {
      this.showError(error.message);
    } finally {
      this.isComputing = false;
      find("heat-button").textContent = "Compute";
      find("heat-result").hidden = !this.maps.size;
      this.refresh();
    }
  }

  showLevels() {
    const caption = find("heat-row").value;
    const levels = [...this.maps.values()].flatMap((rows) => [...(rows.get(caption)?.keys() ?? [])]);
    setOptions(find("heat-level"), [...new Set(levels)], "all levels");
    this.refresh();
  }

  /** The layer that a model's view shows now. */
  getLayer(name) {
    const layer = this.maps.get(name)?.get(find("heat-row").value)?.get(find("heat-level").value) ?? null;
    return { heat: layer, heatOpacity: Number(find("heat-opacity").value) };
  }
}
