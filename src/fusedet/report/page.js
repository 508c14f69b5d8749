"use strict";
// Everything that follows the threshold, and tables that sort. Texts are set by textContent only.
(() => {
  const counts = JSON.parse(document.getElementById("counts").textContent);
  const slider = document.getElementById("threshold");
  const format = (n) => n.toLocaleString("en-US");
  const countFrom = (histogram, threshold) => {
    let sum = 0;
    for (let i = 0; i < histogram.length; i += 2) if (histogram[i] >= threshold) sum += histogram[i + 1];
    return sum;
  };
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const setText = (elements, text) => elements.forEach((element) => { element.textContent = text; });

  function fillKinds(threshold) {
    const numbers = Object.fromEntries(Object.entries(counts.kinds).map(([k, own]) => [k, countFrom(own, threshold)]));
    const instances = counts.objects.reduce((a, b) => a + b, 0);
    numbers.missed = instances - numbers.correct - numbers.classification;
    for (const [kind, n] of Object.entries(numbers)) setText(all(`[data-count="${kind}"]`), format(n));
  }

  function fillClasses(threshold) {
    for (const row of all("#classes tbody tr")) {
      const k = Number(row.dataset.class);
      const truePositives = countFrom(counts.true_positives[k], threshold);
      const detections = truePositives + countFrom(counts.false_positives[k], threshold);
      const values = { precision: truePositives / detections, recall: truePositives / counts.objects[k] };
      for (const cell of all("[data-role]", row)) {
        const value = values[cell.dataset.role];
        cell.textContent = Number.isFinite(value) ? value.toFixed(3) : "-";
        if (Number.isFinite(value)) cell.dataset.v = value; else delete cell.dataset.v;
      }
    }
  }

  function fillMatrix(threshold) {
    const rows = all("#confusion tbody tr").map((row) => all("td", row));
    const matrix = rows.map((cells) => cells.map(() => 0));
    for (const [r, c, histogram] of counts.cells) matrix[r][c] = countFrom(histogram, threshold);
    matrix.forEach((own, r) => {
      const sum = own.reduce((a, b) => a + b, 0);
      if (r < matrix.length - 1) own[own.length - 1] = counts.totals[r] - sum;
      const total = own.reduce((a, b) => a + b, 0);
      own.forEach((count, c) => {
        rows[r][c].textContent = count ? String(count) : "";
        rows[r][c].style.setProperty("--a", total ? (count / total).toFixed(2) : "0");
      });
    });
  }

  const groups = new Map(all("[data-group]").map((group) => [group.dataset.group, group.querySelector(".thumbs")]));
  const figures = all("figure[data-order]").sort((a, b) => a.dataset.order - b.dataset.order);
  function fillGallery(threshold) {
    const apart = document.getElementById("apart");
    if (!apart) return;
    const shown = new Map([...groups.keys()].map((kind) => [kind, 0]));
    for (const figure of figures) {
      const kind = threshold <= Number(figure.dataset.bin) ? figure.dataset.kind : figure.dataset.above;
      figure.classList.toggle("is-missed", kind === "missed");
      (kind ? groups.get(kind) : apart).append(figure); // in order, because all are appended in order
      if (kind) shown.set(kind, shown.get(kind) + 1);
    }
    for (const [kind, n] of shown) setText(all(`[data-shown="${kind}"]`), String(n));
  }

  function update() {
    const threshold = Number(slider.value);
    const text = (threshold / 100).toFixed(2);
    document.getElementById("at").textContent = text;
    slider.setAttribute("aria-valuetext", text);
    fillKinds(threshold);
    fillClasses(threshold);
    fillMatrix(threshold);
    fillGallery(threshold);
  }

  function makeSortable(table) {
    const head = all("thead th", table);
    head.forEach((cell, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = cell.textContent;
      cell.replaceChildren(button);
      button.addEventListener("click", () => {
        const first = column === 0 ? "ascending" : "descending";
        const other = first === "ascending" ? "descending" : "ascending";
        const order = cell.getAttribute("aria-sort") === first ? other : first;
        head.forEach((own) => own.removeAttribute("aria-sort"));
        cell.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        const value = (row) => row.cells[column].dataset.v;
        const rows = all("tbody tr", table).sort((a, b) => {
          if (column === 0) return sign * a.cells[0].textContent.localeCompare(b.cells[0].textContent);
          const [x, y] = [value(a), value(b)];
          if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
          return sign * (Number(x) - Number(y));
        });
        table.tBodies[0].append(...rows);
      });
    });
  }

  all(".control [hidden]").forEach((element) => { element.hidden = false; });
  all("[data-jump]").forEach((button) => button.addEventListener("click", () => {
    slider.value = button.dataset.jump;
    update();
  }));
  slider.addEventListener("input", update);
  all("#classes").forEach(makeSortable);
  const initial = document.querySelector("#classes thead th:nth-child(4)");
  if (initial) initial.setAttribute("aria-sort", "ascending");
  update(); // a browser may have kept the slider's place
})();
