// Panels: a square of cells, its part in view, and how a cell's value becomes a colour.

const MARGIN = { left: 44, bottom: 20, top: 8, right: 10 };

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
