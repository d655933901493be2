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
  buildCurves();
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
