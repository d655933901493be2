// The address may name a head and a cell: #head=3:5&cell=40,12&span=64

async function start() {
  element("summary").textContent = data.summary;
  element("provenance").textContent = JSON.stringify(data.provenance, null, 1);
  const wanted = new URLSearchParams(location.hash.slice(1));
  const [layer, head] = firstHead(wanted.get("head"));
  if (data.layers) {
    listenToSelects();
    listenToGrid();
    drawLegend();
    await showHead(layer, Math.min(head, data.heads - 1));
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

// Of an address with a layer that the page does not have, the last one.
function firstHead(wanted) {
  const [layer, head] = (wanted || data.first).split(":").map(Number);
  if (!wanted) return [layer, head];
  return [data.numbers.includes(layer) ? data.numbers.indexOf(layer) : data.layers - 1, head];
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
