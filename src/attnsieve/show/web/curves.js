// Curves: a metric against density, plans of a family joined, dense attention as a line.

const FAMILY_COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"];
const FRAME = { left: 56, right: 16, top: 12, bottom: 34, width: 640, height: 340 };
const curves = { points: [] };

function taskOf(row) {
  return row.variant ? `${row.task} ${row.variant}` : row.task;
}

/** The name of a plan without the number at its end. */
function familyOf(plan) {
  return plan.replace(/-\d*\.?\d+(e-?\d+)?$/, "");
}

function buildCurves() {
  const choices = { task: taskOf, length: (row) => row.length, metric: (row) => row.metric };
  for (const [name, read] of Object.entries(choices)) {
    const select = element(`curve-${name}`);
    fillSelect(select, [...new Set(data.rows.map(read))].map((value) => [value, value]));
    select.addEventListener("change", drawCurves);
  }
  element("curves").addEventListener("pointermove", (event) => {
    const box = element("curves").getBoundingClientRect();
    const near = curves.points.filter(({ x, y }) => Math.hypot(x - event.clientX + box.left, y - event.clientY + box.top) < 10);
    element("point").textContent = near.map(({ row }) => pointText(row)).join("; ");
  });
  drawCurves();
}

function pointText(row) {
  const error = row.stderr ? ` ± ${row.stderr.toPrecision(2)}` : "";
  return `${row.plan}: density ${percent(row.density)}, ${row.metric} ${row.value.toPrecision(4)}${error}`;
}

function chosenRows() {
  const [task, length, metric] = ["task", "length", "metric"].map((name) => element(`curve-${name}`).value);
  return data.rows.filter((row) => taskOf(row) === task && String(row.length) === length && row.metric === metric && row.density !== null);
}

function drawCurves() {
  const canvas = element("curves");
  const scale = window.devicePixelRatio || 1;
  Object.assign(canvas.style, { width: `${FRAME.width}px`, height: `${FRAME.height}px` });
  Object.assign(canvas, { width: FRAME.width * scale, height: FRAME.height * scale });
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.font = "11px system-ui, sans-serif";
  const rows = chosenRows();
  const frame = axesOf(rows);
  drawFrame(pen, frame);
  const families = [...new Set(data.rows.filter((row) => row.plan !== "dense").map((row) => familyOf(row.plan)))];
  curves.points = [];
  for (const row of rows) if (row.plan === "dense") drawDense(pen, frame, row);
  families.forEach((name, place) => {
    const members = rows.filter((row) => row.plan !== "dense" && familyOf(row.plan) === name);
    drawFamily(pen, frame, members.sort((a, b) => a.density - b.density), FAMILY_COLOURS[place % FAMILY_COLOURS.length]);
  });
  const shown = families.filter((name) => rows.some((row) => familyOf(row.plan) === name));
  fillLegend(element("families"), shown.map((name) => [FAMILY_COLOURS[families.indexOf(name) % FAMILY_COLOURS.length], name]));
}

/** Where densities (on a log scale) and values lie on the canvas. */
function axesOf(rows) {
  const values = rows.flatMap((row) => [row.value - (row.stderr || 0), row.value + (row.stderr || 0)]);
  const [low, high] = values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
  const room = 0.06 * (high - low || Math.abs(high) || 1);
  const least = Math.min(0.01, ...rows.map((row) => Math.max(row.density, 1e-4))) * 0.8;
  const x = (density) => FRAME.left + (Math.log(Math.max(density, 1e-4) / least) / Math.log(1.15 / least)) * (FRAME.width - FRAME.left - FRAME.right);
  const y = (value) => FRAME.top + ((high + room - value) / (high - low + 2 * room)) * (FRAME.height - FRAME.top - FRAME.bottom);
  return { x, y, low: low - room, high: high + room, least };
}

function drawFrame(pen, { x, y, low, high, least }) {
  pen.strokeStyle = "#ececec";
  pen.fillStyle = "#606060";
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  const raw = (high - low) / 6;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((k) => k * power).find((size) => size >= raw);
  for (let value = Math.ceil(low / step) * step; value <= high; value += step) {
    pen.beginPath();
    pen.moveTo(FRAME.left, y(value));
    pen.lineTo(FRAME.width - FRAME.right, y(value));
    pen.stroke();
    pen.fillText(String(Number(value.toPrecision(6))), FRAME.left - 6, y(value));
  }
  pen.textAlign = "center";
  pen.textBaseline = "top";
  for (const density of [0.003, 0.01, 0.03, 0.1, 0.3, 1]) {
    if (density >= least) pen.fillText(percent(density), x(density), FRAME.height - FRAME.bottom + 5);
  }
  pen.fillText("density", (FRAME.left + FRAME.width) / 2, FRAME.height - 14);
}

function drawDense(pen, { y }, row) {
  const error = row.stderr || 0;
  pen.fillStyle = "rgba(96, 96, 96, .12)";
  pen.fillRect(FRAME.left, y(row.value + error), FRAME.width - FRAME.left - FRAME.right, y(row.value - error) - y(row.value + error));
  pen.strokeStyle = "#606060";
  pen.setLineDash([5, 4]);
  pen.beginPath();
  pen.moveTo(FRAME.left, y(row.value));
  pen.lineTo(FRAME.width - FRAME.right, y(row.value));
  pen.stroke();
  pen.setLineDash([]);
}

function drawFamily(pen, { x, y }, rows, colour) {
  Object.assign(pen, { strokeStyle: colour, fillStyle: colour, lineWidth: 1.4 });
  pen.beginPath();
  rows.forEach((row, place) => (place ? pen.lineTo(x(row.density), y(row.value)) : pen.moveTo(x(row.density), y(row.value))));
  pen.stroke();
  for (const row of rows) {
    const [across, down, error] = [x(row.density), y(row.value), row.stderr || 0];
    pen.beginPath();
    pen.moveTo(across, y(row.value - error));
    pen.lineTo(across, y(row.value + error));
    pen.stroke();
    pen.beginPath();
    pen.arc(across, down, 4, 0, 2 * Math.PI);
    pen.fill();
    curves.points.push({ x: across, y: down, row });
  }
}
