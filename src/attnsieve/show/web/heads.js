// One head in panels, all heads in a grid.

// Layers are counted as in the plan, which has none for those without attention; data.numbers says what the model calls them.
const state = { layer: 0, head: 0, colour: "density", rule: null, map: null, panels: [] };

async function showHead(layer, head) {
  Object.assign(state, { layer, head });
  const [map, rule] = await Promise.all([readMap(layer, head), readRule(layer, head)]);
  // Another head may have been chosen meanwhile.
  if (state.layer !== layer || state.head !== head) return;
  Object.assign(state, { map, rule });
  element("layer").value = layer;
  element("head").value = head;
  element("name").textContent = `Layer ${data.numbers[layer]}, head ${head}`;
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
  for (let layer = 0; layer < data.layers; layer += height < 12 ? 4 : 1) pen.fillText(data.numbers[layer], 17, 22 + (layer + 0.5) * height);
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
  const kinds = () => data.kinds.map(({ name, letter, colour, count }) => [colour, `${letter}  ${name}: ${count} heads`]);
  const shares = () => [0.01, 0.1, 0.5, 1].map((share) => [`rgb(${SHARES[state.colour](share).join(",")})`, percent(share)]);
  fillLegend(element("legend"), state.colour === "kind" ? kinds() : data[state.colour] ? shares() : []);
}

function fillLegend(parent, entries) {
  parent.replaceChildren(...entries.map(([colour, text]) => {
    const entry = document.createElement("span");
    const patch = document.createElement("i");
    patch.style.background = colour;
    entry.append(patch, text);
    return entry;
  }));
}

function showPlace(layer, head) {
  const parts = [`layer ${data.numbers[layer]}, head ${head}`];
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
  fillSelect(element("layer"), data.numbers.map((number, layer) => [layer, number]));
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
