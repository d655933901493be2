"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const MARGIN = { left: 44, bottom: 20, top: 8, right: 10 };
const FUTURE = [233, 233, 233];
const VIRIDIS = ["440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725"].map(rgb);
const CIVIDIS = ["00224e", "2a3f6d", "575d6d", "7d7c78", "a59c74", "d2c060", "fee838"].map(rgb);
const INK = ["ffffff", "0072b2", "00263d"].map(rgb);
const state = { layer: 0, head: 0, colour: "density", rule: null, map: null, panels: [] };

function rgb(hex) {
  return [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

/** Colour at a share from 0 to 1 of the way along a list of colours. */
function along(colours, share) {
  const at = Math.min(Math.max(share, 0), 1) * (colours.length - 1);
  const low = Math.min(Math.floor(at), colours.length - 2);
  return colours[low].map((value, k) => Math.round(value + (at - low) * (colours[low + 1][k] - value)));
}

function percent(share) {
  if (share === null || share === undefined) return "-";
  const number = 100 * share;
  return `${number > 0 && number < 9.95 ? number.toFixed(1) : number.toFixed(0)} %`;
}

// Data: base64 of zlib streams, unpacked when first needed.

const unpacked = new Map();

function unpack(number) {
  if (!unpacked.has(number)) unpacked.set(number, inflate(data.blobs[number]));
  return unpacked.get(number);
}

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

/** Mean maps are stored as logarithms in 16 bits, 0 for 0, the lower triangle row by row. */
const LEVELS = Float32Array.from({ length: 65536 }, (_, code) =>
  code === 0 ? 0 : Math.exp(Math.log(data.floor) * (1 - (code - 1) / 65534)),
);

async function readMap(layer, head) {
  const number = data.maps[`${layer}:${head}`];
  if (number === undefined) return null;
  const codes = new Uint16Array(await unpack(number));
  return { size: data.pcl, value: (i, j) => LEVELS[codes[(i * (i + 1)) / 2 + j]] };
}

async function readRule(layer, head) {
  if (!data.rules) return null;
  const rule = data.rules[data.choice[layer][head]];
  const [end, offset, corner, table] = await Promise.all(
    ["end", "offset", "corner", "table"].map((part) => (rule[part] === null ? null : unpack(rule[part]))),
  );
  return {
    ...rule,
    end: new Int32Array(end),
    offset: offset && new Uint8Array(offset),
    corner: corner && new Uint8Array(corner),
    table: table && new Uint8Array(table),
  };
}

function bit(bits, at) {
  return (bits[at >> 3] >> (at & 7)) & 1;
}

/** Whether query i keeps key j: the definition of a layout's row. */
function keeps(rule, i, j) {
  if (j > i) return false;
  if (i < rule.rows) return bit(rule.corner, i * 8 * Math.ceil(rule.rows / 8) + j) === 1;
  if (i < rule.end[j]) return true;
  if (rule.offset && bit(rule.offset, i - j)) return true;
  if (!rule.table) return false;
  const [rows, keys] = rule.block;
  const across = Math.ceil(data.tokens / keys);
  return bit(rule.table, Math.floor(i / rows) * across + Math.floor(j / keys)) === 1;
}

function boxcox(value) {
  const { lam, eps } = data.boxcox;
  const grow = (x) => (lam === 0 ? Math.log(x) : Math.expm1(lam * Math.log(x)) / lam);
  return grow(Math.max(value, eps)) - grow(eps);
}

// Panels: a square of cells, its part in view, and how a cell's value becomes a colour.

class Panel {
  constructor(title, note, size, value, colour, gather, view) {
    Object.assign(this, { title, note, size, value, colour, gather, view });
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("aria-label", title);
    this.listen();
  }

  mount(parent) {
    const box = document.createElement("div");
    const heading = document.createElement("h3");
    heading.textContent = this.title;
    const note = document.createElement("p");
    note.textContent = this.note;
    box.append(heading, this.canvas, note);
    parent.append(box);
  }

  resize() {
    const width = Math.min(this.canvas.parentElement.clientWidth, 520);
    this.scale = window.devicePixelRatio || 1;
    this.side = width - MARGIN.left - MARGIN.right;
    const height = this.side + MARGIN.top + MARGIN.bottom;
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    this.canvas.width = Math.round(width * this.scale);
    this.canvas.height = Math.round(height * this.scale);
  }

  draw() {
    const pen = this.canvas.getContext("2d");
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.clearRect(0, 0, this.canvas.width, this.canvas.height);
    const side = Math.round(this.side * this.scale);
    pen.putImageData(this.image(side), Math.round(MARGIN.left * this.scale), Math.round(MARGIN.top * this.scale));
    pen.setTransform(this.scale, 0, 0, this.scale, 0, 0);
    this.drawAxes(pen);
  }

  /** Every pixel gathers the causal cells that it covers, so that no line falls between two pixels. */
  image(side) {
    const image = new ImageData(side, side);
    const { i0, j0, span } = this.view;
    const edge = Array.from({ length: side + 1 }, (_, at) => (at * span) / side);
    for (let y = 0; y < side; y++) {
      const [top, bottom] = cover(i0 + edge[y], i0 + edge[y + 1], this.size);
      for (let x = 0; x < side; x++) {
        const [left, right] = cover(j0 + edge[x], j0 + edge[x + 1], this.size);
        const value = this.over(top, bottom, left, right);
        image.data.set(value === null ? FUTURE : this.colour(value), 4 * (y * side + x));
        image.data[4 * (y * side + x) + 3] = value === undefined ? 0 : 255;
      }
    }
    return image;
  }

  /** The gathered value of cells, null where all lie in the future, undefined outside of the square. */
  over(top, bottom, left, right) {
    if (top >= bottom || left >= right) return undefined;
    let sum = 0;
    let most = 0;
    let count = 0;
    for (let i = top; i < bottom; i++) {
      const last = Math.min(right, i + 1);
      for (let j = left; j < last; j++) {
        const value = Number(this.value(i, j));
        sum += value;
        if (value > most) most = value;
        count++;
      }
    }
    if (!count) return null;
    return this.gather === "mean" ? sum / count : most;
  }

  drawAxes(pen) {
    const { i0, j0, span } = this.view;
    const cell = this.side / span;
    pen.font = "11px system-ui, sans-serif";
    pen.fillStyle = "#606060";
    pen.strokeStyle = "#b0b0b0";
    pen.lineWidth = 1;
    const step = tickStep(span, this.side / 60);
    for (const [start, across] of [[j0, true], [i0, false]]) {
      for (let at = Math.ceil(start / step) * step; at < start + span; at += step) {
        // Where cells are large, ticks name their middle.
        const place = (at - start + (cell > 12 ? 0.5 : 0)) * cell;
        pen.textAlign = across ? "center" : "right";
        pen.textBaseline = across ? "top" : "middle";
        const [x, y] = across ? [MARGIN.left + place, MARGIN.top + this.side + 5] : [MARGIN.left - 6, MARGIN.top + place];
        pen.fillText(String(at), x, y);
      }
    }
    if (cell > 8) this.drawLines(pen, cell);
    pen.strokeRect(MARGIN.left - 0.5, MARGIN.top - 0.5, this.side + 1, this.side + 1);
  }

  drawLines(pen, cell) {
    const { i0, j0, span } = this.view;
    pen.strokeStyle = "rgba(0, 0, 0, .12)";
    pen.beginPath();
    for (let k = 0; k <= span; k++) {
      const x = MARGIN.left + (Math.ceil(j0) - j0 + k) * cell;
      const y = MARGIN.top + (Math.ceil(i0) - i0 + k) * cell;
      if (x <= MARGIN.left + this.side) pen.moveTo(x, MARGIN.top), pen.lineTo(x, MARGIN.top + this.side);
      if (y <= MARGIN.top + this.side) pen.moveTo(MARGIN.left, y), pen.lineTo(MARGIN.left + this.side, y);
    }
    pen.stroke();
    pen.strokeStyle = "#b0b0b0";
  }

  /** The cell under a pointer, or null. */
  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const { i0, j0, span } = this.view;
    const x = (event.clientX - box.left - MARGIN.left) / this.side;
    const y = (event.clientY - box.top - MARGIN.top) / this.side;
    if (x < 0 || y < 0 || x >= 1 || y >= 1) return null;
    return { i: Math.floor(i0 + y * span), j: Math.floor(j0 + x * span), x, y };
  }

  zoom(factor, x = 0.5, y = 0.5) {
    const { i0, j0, span } = this.view;
    const next = Math.min(Math.max(span * factor, 4), this.view.size);
    this.move(i0 + y * (span - next), j0 + x * (span - next), next);
  }

  move(i0, j0, span = this.view.span) {
    const most = this.view.size - span;
    Object.assign(this.view, { i0: Math.min(Math.max(i0, 0), most), j0: Math.min(Math.max(j0, 0), most), span });
    redraw(this.view);
  }

  listen() {
    let grip = null;
    this.canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      const spot = this.at(event);
      if (spot) this.zoom(event.deltaY > 0 ? 1.25 : 0.8, spot.x, spot.y);
    });
    this.canvas.addEventListener("pointerdown", (event) => {
      grip = { x: event.clientX, y: event.clientY, ...this.view };
      this.canvas.setPointerCapture(event.pointerId);
    });
    this.canvas.addEventListener("pointerup", () => (grip = null));
    this.canvas.addEventListener("pointermove", (event) => {
      const spot = this.at(event);
      if (spot) showCell(spot.i, spot.j);
      if (!grip) return;
      const cell = this.side / grip.span;
      this.move(grip.i0 - (event.clientY - grip.y) / cell, grip.j0 - (event.clientX - grip.x) / cell);
    });
    this.canvas.addEventListener("dblclick", () => this.zoom(Infinity));
    this.canvas.addEventListener("keydown", (event) => this.press(event));
  }

  press(event) {
    const { i0, j0, span } = this.view;
    const step = Math.max(1, span / 8);
    const moves = { ArrowUp: [-step, 0], ArrowDown: [step, 0], ArrowLeft: [0, -step], ArrowRight: [0, step] };
    if (event.key in moves) this.move(i0 + moves[event.key][0], j0 + moves[event.key][1]);
    else if (event.key === "+" || event.key === "=") this.zoom(0.8);
    else if (event.key === "-") this.zoom(1.25);
    else if (event.key === "0") this.zoom(Infinity);
    else return;
    event.preventDefault();
  }
}

/** Whole cells of a stretch, at least one of them while it lies inside. */
function cover(from, to, size) {
  const first = Math.floor(from);
  return [first, Math.min(Math.max(first + 1, Math.floor(to)), size)];
}

function tickStep(span, most) {
  const raw = span / most;
  const power = 10 ** Math.floor(Math.log10(Math.max(raw, 1)));
  return Math.max(1, [1, 2, 5, 10].map((k) => k * power).find((step) => step >= raw));
}

function redraw(view) {
  for (const panel of state.panels) if (panel.view === view) panel.draw();
}

// One head.

async function showHead(layer, head) {
  Object.assign(state, { layer, head });
  const [map, rule] = await Promise.all([readMap(layer, head), readRule(layer, head)]);
  // Another head may have been chosen meanwhile.
  if (state.layer !== layer || state.head !== head) return;
  Object.assign(state, { map, rule });
  element("layer").value = layer;
  element("head").value = head;
  element("name").textContent = `Layer ${layer}, head ${head}`;
  element("rule").textContent = rule ? rule.text : "";
  buildPanels();
  drawGrid();
  showPlace(layer, head);
}

function buildPanels() {
  const views = new Map(state.panels.map((panel) => [panel.view.size, panel.view]));
  const view = (size) => {
    if (!views.has(size)) views.set(size, { i0: 0, j0: 0, span: size, size });
    return views.get(size);
  };
  state.panels = [];
  if (state.map) addMaps(view);
  if (state.rule) addMasks(view);
  const parent = element("panels");
  parent.replaceChildren();
  for (const panel of state.panels) panel.mount(parent);
  if (!state.panels.length) parent.textContent = "This page holds no map of this head: name it with --heads.";
  for (const panel of state.panels) panel.resize(), panel.draw();
}

function addMaps(view) {
  const { size, value } = state.map;
  const { lam, tau } = data.boxcox;
  const low = Math.log(3e-4);
  const top = Math.max(boxcox(1), 1.1 * tau);
  const centred = (x) => (x < tau ? (0.5 * x) / tau : 0.5 + (0.5 * (x - tau)) / (top - tau));
  state.panels.push(
    new Panel(
      "Mean attention",
      "probability on a log scale, from 0.0003 (dark) to 1; a pixel shows its largest cell",
      size, value, (p) => along(VIRIDIS, p > 0 ? 1 - Math.log(p) / low : 0), "most", view(size),
    ),
    new Panel(
      `Box-Cox map, λ = ${lam}`,
      `amplified attention from 0 to ${top.toFixed(2)}, the scale centred at τ = ${tau}`,
      size, (i, j) => boxcox(value(i, j)), (x) => along(VIRIDIS, centred(x)), "most", view(size),
    ),
  );
}

function addMasks(view) {
  const { rule } = state;
  const kept = (i, j) => keeps(rule, i, j);
  const ink = (share) => along(INK, Math.sqrt(share));
  const rest = rule.dynamic ? "; what is chosen from the input comes on top" : "";
  const corner = Math.min(rule.rows || data.pcl || 0, data.tokens);
  if (corner) {
    const name = rule.captured ? "True mask" : "Mask";
    state.panels.push(new Panel(`${name}, rows below ${corner}`, `kept pairs${rest}`, corner, kept, ink, "mean", view(corner)));
  }
  const name = rule.captured ? "Extended mask" : "Mask";
  state.panels.push(
    new Panel(`${name}, ${data.tokens} tokens`, `kept pairs; darker where more of a pixel's pairs are kept${rest}`, data.tokens, kept, ink, "mean", view(data.tokens)),
  );
}

function showCell(i, j) {
  const parts = [`query i = ${i}, key j = ${j}, distance ${i - j}`];
  if (j > i) parts.push("the future: no query reads it");
  else {
    if (state.map && i < state.map.size) {
      const value = state.map.value(i, j);
      parts.push(`mean attention ${value.toPrecision(4)}`, `Box-Cox ${boxcox(value).toPrecision(4)}`);
    }
    if (state.rule && i < data.tokens) {
      const kept = keeps(state.rule, i, j);
      parts.push(kept ? "kept" : state.rule.dynamic ? "kept if the input says so" : "left out");
    }
  }
  element("cell").textContent = parts.join("; ");
}

// All heads.

const SHARES = {
  density: (share) => along(CIVIDIS, 1 + Math.log(Math.max(share, 0.005)) / Math.log(200)),
  retained: (share) => along(CIVIDIS, share),
};

function gridCell() {
  return { width: Math.min(34, Math.max(10, 560 / data.heads)), height: Math.min(20, Math.max(8, 620 / data.layers)) };
}

function drawGrid() {
  const canvas = element("grid");
  const { width, height } = gridCell();
  const scale = window.devicePixelRatio || 1;
  const [across, down] = [34 + width * data.heads + 2, 22 + height * data.layers + 2];
  Object.assign(canvas.style, { width: `${across}px`, height: `${down}px` });
  Object.assign(canvas, { width: Math.round(across * scale), height: Math.round(down * scale) });
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.font = "10px system-ui, sans-serif";
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  for (let layer = 0; layer < data.layers; layer++)
    for (let head = 0; head < data.heads; head++) drawGridCell(pen, layer, head, width, height);
  pen.fillStyle = "#606060";
  for (let head = 0; head < data.heads; head += width < 16 ? 4 : 1) pen.fillText(head, 34 + (head + 0.5) * width, 11);
  for (let layer = 0; layer < data.layers; layer += height < 12 ? 4 : 1) pen.fillText(layer, 17, 22 + (layer + 0.5) * height);
  pen.lineWidth = 2.5;
  pen.strokeStyle = "#d55e00";
  pen.strokeRect(34 + state.head * width, 22 + state.layer * height, width, height);
}

function drawGridCell(pen, layer, head, width, height) {
  const { colour, text } = headLook(layer, head);
  pen.fillStyle = `rgb(${colour.join(",")})`;
  pen.fillRect(34 + head * width, 22 + layer * height, width - 1, height - 1);
  if (width < 22 || height < 12) return;
  const bright = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2];
  pen.fillStyle = bright > 120 ? "#000" : "#fff";
  pen.fillText(text, 34 + (head + 0.5) * width, 22 + (layer + 0.5) * height);
}

function headLook(layer, head) {
  if (state.colour === "kind" && data.kind) {
    const { letter, colour } = data.kinds[data.kind[layer][head]];
    return { colour: rgb(colour.slice(1)), text: letter };
  }
  const shares = data[state.colour];
  if (!shares) return { colour: FUTURE, text: "" };
  return { colour: SHARES[state.colour](shares[layer][head]), text: percent(shares[layer][head]).replace(" %", "") };
}

function drawLegend() {
  const entries = state.colour === "kind" && data.kinds
    ? data.kinds.map(({ name, letter, colour, count }) => [colour, `${letter}  ${name}: ${count} heads`])
    : data[state.colour] ? [0.01, 0.1, 0.5, 1].map((share) => [`rgb(${SHARES[state.colour](share).join(",")})`, percent(share)]) : [];
  element("legend").replaceChildren(...entries.map(([colour, text]) => {
    const entry = document.createElement("span");
    const patch = document.createElement("i");
    patch.style.background = colour;
    entry.append(patch, text);
    return entry;
  }));
}

function showPlace(layer, head) {
  const parts = [`layer ${layer}, head ${head}`];
  if (data.density) parts.push(`density ${percent(data.density[layer][head])}`);
  if (data.retained) parts.push(`retained mass ${percent(data.retained[layer][head])}`);
  if (data.kind) parts.push(data.kinds[data.kind[layer][head]].name);
  element("place").textContent = parts.join(", ");
}

function listenToGrid() {
  const canvas = element("grid");
  const spot = (event) => {
    const box = canvas.getBoundingClientRect();
    const { width, height } = gridCell();
    const [head, layer] = [Math.floor((event.clientX - box.left - 34) / width), Math.floor((event.clientY - box.top - 22) / height)];
    return head >= 0 && layer >= 0 && head < data.heads && layer < data.layers ? [layer, head] : null;
  };
  canvas.addEventListener("click", (event) => spot(event) && showHead(...spot(event)));
  canvas.addEventListener("pointermove", (event) => spot(event) && showPlace(...spot(event)));
  canvas.addEventListener("pointerleave", () => showPlace(state.layer, state.head));
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const [layer, head] = [state.layer + step[0], state.head + step[1]];
    if (layer >= 0 && head >= 0 && layer < data.layers && head < data.heads) showHead(layer, head);
  });
}

function fillSelect(select, values) {
  select.replaceChildren(...values.map(([value, text]) => new Option(text, value)));
}

function listenToSelects() {
  const numbers = (count) => Array.from({ length: count }, (_, number) => [number, number]);
  fillSelect(element("layer"), numbers(data.layers));
  fillSelect(element("head"), numbers(data.heads));
  const colours = [["density", "density"], ["retained", "retained mass"], ["kind", "kind of rule"]].filter(([name]) => data[name]);
  fillSelect(element("colour"), colours);
  state.colour = colours.length ? colours[0][0] : "";
  element("colour").parentElement.hidden = !colours.length;
  for (const id of ["layer", "head"]) {
    element(id).addEventListener("change", () => showHead(Number(element("layer").value), Number(element("head").value)));
  }
  element("colour").addEventListener("change", () => {
    state.colour = element("colour").value;
    drawGrid();
    drawLegend();
  });
}

// Result rows.

const COLUMNS = [
  ["task", "task"], ["length", "length"], ["items", "items"], ["metric", "metric"], ["plan", "plan"], ["density", "density %"],
  ["value", "value"], ["stderr", "± "], ["dense_value", "dense"], ["paired_difference", "difference"], ["paired_stderr", "±"],
];
const order = { column: null, down: false };

function buildRows() {
  if (!data.rows) return;
  element("results").hidden = false;
  const line = document.createElement("tr");
  for (const [name, title] of COLUMNS) {
    const cell = document.createElement("th");
    const button = document.createElement("button");
    button.textContent = title;
    button.addEventListener("click", () => {
      Object.assign(order, { column: name, down: order.column === name && !order.down });
      drawRows();
    });
    cell.className = typeof data.rows[0][name] === "string" ? "text" : "";
    cell.append(button);
    line.append(cell);
  }
  element("rows").tHead.replaceChildren(line);
  element("filter").addEventListener("input", drawRows);
  drawRows();
}

function drawRows() {
  const words = element("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = data.rows.filter((row) => {
    const text = COLUMNS.map(([name]) => row[name]).join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  });
  if (order.column) rows.sort((a, b) => compare(a[order.column], b[order.column]) * (order.down ? -1 : 1));
  element("count").textContent = `${rows.length} of ${data.rows.length} rows`;
  element("rows").tBodies[0].replaceChildren(...rows.map((row) => {
    const line = document.createElement("tr");
    for (const [name] of COLUMNS) {
      const cell = document.createElement("td");
      cell.textContent = cellText(name, row[name]);
      cell.className = typeof row[name] === "string" ? "text" : "";
      line.append(cell);
    }
    return line;
  }));
}

function compare(a, b) {
  if (a === b) return 0;
  if (a === null || a === undefined) return 1;
  if (b === null || b === undefined) return -1;
  return a < b ? -1 : 1;
}

function cellText(name, value) {
  if (value === null || value === undefined) return "";
  if (name === "density") return percent(value).replace(" %", "");
  if (typeof value !== "number" || Number.isInteger(value)) return String(value);
  return name.startsWith("paired_d") && value > 0 ? `+${value.toPrecision(3)}` : value.toPrecision(3);
}

// The address may name a head and a cell: #head=3:5&cell=40,12&span=64

async function start() {
  element("summary").textContent = data.summary;
  element("provenance").textContent = JSON.stringify(data.provenance, null, 1);
  const wanted = new URLSearchParams(location.hash.slice(1));
  const [layer, head] = (wanted.get("head") || data.first).split(":").map(Number);
  if (data.layers) {
    listenToSelects();
    listenToGrid();
    drawLegend();
    await showHead(Math.min(layer, data.layers - 1), Math.min(head, data.heads - 1));
  } else document.querySelector("main").hidden = true;
  buildRows();
  const cell = wanted.get("cell");
  if (cell) {
    const [i, j] = cell.split(",").map(Number);
    const span = Number(wanted.get("span")) || 32;
    for (const panel of state.panels) panel.move(i - span / 2, j - span / 2, Math.min(span, panel.view.size));
    showCell(i, j);
  }
  window.addEventListener("resize", () => state.panels.forEach((panel) => (panel.resize(), panel.draw())));
  document.body.dataset.ready = "yes";
}

window.addEventListener("unhandledrejection", (event) => fail(event.reason));
window.addEventListener("error", (event) => fail(event.error || event.message));

function fail(reason) {
  document.body.dataset.error = String(reason);
  const line = document.createElement("p");
  line.id = "error";
  line.textContent = `This page could not be built: ${reason}. It needs a browser from 2023 or later.`;
  document.body.prepend(line);
}

start();
