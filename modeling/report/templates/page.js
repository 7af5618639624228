"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// The gallery: sorted by a button, filtered by a cell of the confusion matrix.
const gallery = document.querySelector(".gallery");
if (gallery) {
  const cases = all(".case", gallery);
  const count = document.querySelector("#shown");
  const cells = all(".cells button");
  const chosen = { true: null, predicted: null };
  const filter = () => {
    let shown = 0;
    for (const one of cases) {
      const fits = chosen.true === null || (one.dataset.true === chosen.true && one.dataset.predicted === chosen.predicted);
      one.hidden = !fits;
      shown += fits;
    }
    for (const cell of cells)
      cell.setAttribute("aria-pressed", String(cell.dataset.true === chosen.true && cell.dataset.predicted === chosen.predicted));
    document.querySelector("#every").hidden = chosen.true === null;
    count.textContent = `${shown} of ${cases.length} pairs shown`;
  };
  for (const cell of cells)
    cell.addEventListener("click", () => {
      const again = cell.getAttribute("aria-pressed") === "true";
      chosen.true = again ? null : cell.dataset.true;
      chosen.predicted = again ? null : cell.dataset.predicted;
      filter();
    });
  document.querySelector("#every").addEventListener("click", () => {
    chosen.true = chosen.predicted = null;
    filter();
  });
  document.querySelector("#order").addEventListener("change", (event) => {
    const sign = event.target.value === "surest" ? -1 : 1;
    cases.sort((a, b) => sign * (a.dataset.confidence - b.dataset.confidence));
    gallery.append(...cases);
  });
  filter();
}

// Tables whose columns sort.
for (const table of all("table.sortable"))
  all("thead th", table).forEach((head, column) =>
    head.addEventListener("click", () => {
      const ascending = head.dataset.order !== "up";
      all("thead th", table).forEach((other) => delete other.dataset.order);
      head.dataset.order = ascending ? "up" : "down";
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        return (x !== "" && y !== "" && !isNaN(x) && !isNaN(y) ? x - y : x.localeCompare(y)) * (ascending ? 1 : -1);
      });
      table.tBodies[0].append(...rows);
    }),
  );

// Maps of vectors: a point under the pointer tells its row.
const shapes = [
  (c, x, y, r) => c.arc(x, y, r, 0, 7),
  (c, x, y, r) => c.rect(x - r, y - r, 2 * r, 2 * r),
  (c, x, y, r) => { c.moveTo(x, y - 1.3 * r); c.lineTo(x + 1.2 * r, y + r); c.lineTo(x - 1.2 * r, y + r); c.closePath(); },
  (c, x, y, r) => { c.moveTo(x, y - 1.4 * r); c.lineTo(x + 1.4 * r, y); c.lineTo(x, y + 1.4 * r); c.lineTo(x - 1.4 * r, y); c.closePath(); },
];
for (const map of all(".map")) {
  const data = JSON.parse(document.querySelector("#" + map.dataset.points).textContent);
  const rows = JSON.parse(document.querySelector("#map-rows").textContent);
  const canvas = map.querySelector("canvas");
  const tip = map.querySelector(".tip");
  const buttons = all("button", map);
  let method = buttons[0].value;
  let hovered = -1;
  let held = "both";
  const place = () => {
    const { width, height } = canvas;
    const pad = width / 40;
    return data[method].map(([x, y]) => [pad + (x / 1000) * (width - 2 * pad), height - pad - (y / 1000) * (height - 2 * pad)]);
  };
  const shown = (k) => held === "both" || (held === "val") === Boolean(rows.val[k]);
  let points = [];
  const draw = () => {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = canvas.clientWidth * ratio;
    canvas.height = canvas.clientHeight * ratio;
    points = place();
    const c = canvas.getContext("2d");
    const ink = getComputedStyle(document.body).color;
    c.clearRect(0, 0, canvas.width, canvas.height);
    for (const k of rows.order) {
      if (!shown(k)) continue;
      const [x, y] = points[k];
      c.beginPath();
      shapes[rows.label[k] % shapes.length](c, x, y, (k === hovered ? 5 : 2.3) * ratio);
      c.globalAlpha = k === hovered ? 1 : 0.7;
      c.fillStyle = rows.colours[rows.label[k]];
      c.fill();
      if (rows.val[k] || k === hovered) {
        c.globalAlpha = 0.9;
        c.lineWidth = 0.6 * ratio;
        c.strokeStyle = ink;
        c.stroke();
      }
    }
    c.globalAlpha = 1;
  };
  const tell = (event) => {
    const box = canvas.getBoundingClientRect();
    const ratio = canvas.width / box.width;
    const [px, py] = [(event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio];
    let best = (12 * ratio) ** 2;
    let found = -1;
    points.forEach(([x, y], k) => {
      const distance = (x - px) ** 2 + (y - py) ** 2;
      if (shown(k) && distance < best) [best, found] = [distance, k];
    });
    if (found !== hovered) {
      hovered = found;
      draw();
    }
    tip.hidden = found < 0;
    if (found < 0) return;
    tip.replaceChildren();
    if (rows.picture[found]) {
      const picture = document.createElement("img");
      picture.src = rows.picture[found];
      picture.alt = "";
      tip.append(picture);
    }
    const line = document.createElement("div");
    line.textContent = `${rows.id[found]} · ${rows.classes[rows.label[found]]} · ${rows.val[found] ? "validation" : "training"}`;
    const text = document.createElement("div");
    text.textContent = rows.text[found];
    tip.append(line, text);
    const left = event.clientX - box.left;
    const room = box.width - tip.offsetWidth;
    tip.style.left = Math.max(0, Math.min(room, left + 14)) + "px";
    tip.style.top = canvas.offsetTop + event.clientY - box.top + 16 + "px";
  };
  for (const button of buttons)
    button.addEventListener("click", () => {
      method = button.value;
      buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
      draw();
    });
  map.querySelector("select").addEventListener("change", (event) => {
    held = event.target.value;
    draw();
  });
  canvas.addEventListener("pointermove", tell);
  canvas.addEventListener("pointerdown", tell);
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; hovered = -1; draw(); });
  new ResizeObserver(draw).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
}

// The label audit: what a person decides becomes a file, without any server.
const audit = document.querySelector("#audit-rows");
if (audit) {
  const choices = all("select", audit);
  const changed = () => choices.filter((choice) => choice.value !== "");
  const cell = (text) => (/[",\r\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text);
  const button = document.querySelector("#download");
  const update = () => { button.textContent = `download corrections.csv (${changed().length} labels)`; };
  audit.addEventListener("change", update);
  button.addEventListener("click", () => {
    const lines = changed().map((choice) => `${cell(choice.dataset.id)},${cell(choice.value)}`);
    const file = new Blob([["id,label", ...lines].join("\n") + "\n"], { type: "text/csv" });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(file);
    link.download = "corrections.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
  update();
}
