// The report's script: draws curves and plays rows of samples. Without it the page shows tables and single players.
"use strict";

// --- numbers: pure functions, tested under node -------------------------------------------------------------------

// Exponential moving average without the pull of its beginning: sum of w^k y over sum of w^k. weight in [0, 1).
function smoothed(values, weight) {
  if (!weight) return values.slice();
  let sum = 0, norm = 0;
  return values.map((value) => {
    sum = sum * weight + value;
    norm = norm * weight + 1;
    return sum / norm;
  });
}

// Round numbers from lo to hi, about `count` of them.
function ticks(lo, hi, count) {
  if (!(hi > lo)) return [lo];
  const rough = (hi - lo) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough * 0.999999);
  const found = [], first = Math.ceil(lo / step - 1e-9);
  for (let k = 0; k <= 2 * count && (first + k) * step <= hi + step * 1e-9; k += 1) found.push(Number(((first + k) * step).toPrecision(12)));
  return found;
}

// Powers of ten from lo to hi, with 2 and 5 where there are few.
function logTicks(lo, hi) {
  const found = [], few = Math.log10(hi / lo) < 3;
  for (let power = Math.floor(Math.log10(lo)); power <= Math.ceil(Math.log10(hi)); power += 1) {
    for (const factor of few ? [1, 2, 5] : [1]) {
      const value = Number((factor * 10 ** power).toPrecision(3));
      if (value >= lo * 0.999 && value <= hi * 1.001) found.push(value);
    }
  }
  return found.length > 1 ? found : ticks(lo, hi, 4);
}

function shown(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  return String(Number(value.toPrecision(4)));
}

// Index of the number nearest to x in a rising list.
function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1; else high = middle;
  }
  return low > 0 && x - xs[low - 1] <= xs[low] - x ? low - 1 : low;
}

// Lowest and highest of all values that can be drawn; null where there are none. Outliers of raw values are kept.
function extent(lists, log) {
  let lo = Infinity, hi = -Infinity;
  for (const list of lists) for (const value of list) {
    if (!Number.isFinite(value) || (log && value <= 0)) continue;
    if (value < lo) lo = value;
    if (value > hi) hi = value;
  }
  if (lo > hi) return null;
  const equal = hi - lo <= 1e-9 * Math.max(Math.abs(lo), Math.abs(hi)); // what smoothing makes of a constant differs by rounding
  if (equal) return log ? [lo / 2, hi * 2] : [lo - (Math.abs(lo) || 1) * 0.1, hi + (Math.abs(hi) || 1) * 0.1];
  return [lo, hi];
}

// A function from [lo, hi] to [from, to].
function scale(lo, hi, from, to, log) {
  const place = log ? Math.log : (value) => value;
  const start = place(lo), span = place(hi) - start || 1;
  return (value) => from + (place(value) - start) / span * (to - from);
}

// An SVG path; points that cannot be drawn break it.
function path(xs, ys, sx, sy, log) {
  let text = "", pen = "M";
  for (let i = 0; i < xs.length; i += 1) {
    if (!Number.isFinite(ys[i]) || (log && ys[i] <= 0)) { pen = "M"; continue; }
    text += pen + sx(xs[i]).toFixed(1) + " " + sy(ys[i]).toFixed(1);
    pen = "L";
  }
  return text;
}

// The outline of all values between lo and hi; on a log scale what is not above 0 is left out.
function band(xs, lo, hi, sx, sy, log) {
  const keep = xs.map((_, i) => i).filter((i) => !log || lo[i] > 0);
  if (keep.length < 2) return "";
  const point = (i, y) => sx(xs[i]).toFixed(1) + " " + sy(y).toFixed(1);
  return "M" + [...keep.map((i) => point(i, hi[i])), ...keep.reverse().map((i) => point(i, lo[i]))].join("L") + "Z";
}

// --- drawing ------------------------------------------------------------------------------------------------------

const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
const MARGIN = { left: 52, right: 10, top: 8, bottom: 22 };

function make(name, attributes, parent, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

function tag(name, attributes, parent, text) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

class Chart {
  constructor(figure, data, options) {
    this.data = data;
    this.options = options;
    this.hidden = new Set();
    this.at = null; // step under the pointer
    this.svg = make("svg", { class: "plot", role: "img", tabindex: "0", "aria-label": this.summary() });
    this.legend = tag("div", { class: "legend" });
    this.reading = tag("div", { class: "reading", "aria-live": "polite" });
    figure.querySelector("figcaption").after(this.svg, this.legend, this.reading);
    data.series.forEach((series, index) => this.key(series, index));
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.move(null));
    this.svg.addEventListener("keydown", (event) => this.press(event));
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  summary() {
    const ends = this.data.series.map((series) => `${series.name} ${shown(series.y[0])} to ${shown(series.y[series.y.length - 1])}`);
    return `${this.data.title}: ${ends.join(", ")}. Arrow keys read single steps.`;
  }

  key(series, index) {
    const button = tag("button", { type: "button", "aria-pressed": "true" }, this.legend);
    const line = make("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" }, button);
    make("path", { d: "M0 5H26", ...this.stroke(index), "stroke-width": 2.5 }, line);
    button.append(series.name);
    button.addEventListener("click", () => {
      if (!this.hidden.delete(index)) this.hidden.add(index);
      button.setAttribute("aria-pressed", String(!this.hidden.has(index)));
      this.draw();
    });
  }

  stroke(index) {
    return { fill: "none", stroke: `var(--c${index % 8})`, "stroke-dasharray": DASHES[(index + Math.floor(index / 8)) % DASHES.length] };
  }

  visible() {
    return this.data.series.map((series, index) => ({ series, index })).filter(({ index }) => !this.hidden.has(index));
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.svg, { log } = this.options;
    const weight = this.data.noisy ? this.options.weight : 0;
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const lines = this.visible().map(({ series, index }) => ({ series, index, y: smoothed(series.y, weight) }));
    const limit = this.data.limit === null ? [] : [[this.data.limit]];
    const raw = lines.map(({ series, y }) => (weight ? y : series.hi ? series.lo.concat(series.hi) : series.y));
    const rows = extent([...raw, ...limit, ...(this.data.zero && !log ? [[0]] : [])], log), columns = extent(lines.map(({ series }) => series.x));
    this.lines = [];
    if (!rows || !columns || width < 60) return;
    const inside = { right: width - MARGIN.right, bottom: height - MARGIN.bottom };
    this.sx = scale(columns[0], columns[1], MARGIN.left, inside.right);
    this.sy = scale(rows[0], rows[1], inside.bottom, MARGIN.top, log);
    this.axes(rows, columns, inside, log);
    const clip = make("svg", { x: 0, y: MARGIN.top - 2, width, height: inside.bottom - MARGIN.top + 4, overflow: "hidden",
      viewBox: `0 ${MARGIN.top - 2} ${width} ${inside.bottom - MARGIN.top + 4}` }, this.svg);
    for (const { series, index, y } of lines) this.curve(series, index, y, clip, log, weight);
    if (this.data.limit !== null) make("path", { class: "limit", d: `M${MARGIN.left} ${this.sy(this.data.limit)}H${inside.right}` }, clip);
    this.lines = lines;
    this.cross = make("path", { class: "cross", d: "" }, this.svg);
    if (this.at !== null) this.move(this.at);
  }

  curve(series, index, y, parent, log, weight) {
    const { x } = series, color = `var(--c${index % 8})`;
    const outline = series.hi && band(x, series.lo, series.hi, this.sx, this.sy, log);
    if (outline) make("path", { d: outline, fill: color, opacity: 0.13 }, parent);
    if (weight) make("path", { ...this.stroke(index), d: path(x, series.y, this.sx, this.sy, log), opacity: 0.3, "stroke-width": 1 }, parent);
    make("path", { ...this.stroke(index), d: path(x, y, this.sx, this.sy, log), "stroke-width": 1.8 }, parent);
    if (x.length < 30) x.forEach((step, i) => {
      if (Number.isFinite(y[i]) && (!log || y[i] > 0)) make("circle", { cx: this.sx(step), cy: this.sy(y[i]), r: 2.5, fill: color }, parent);
    });
  }

  axes(rows, columns, inside, log) {
    for (const value of log ? logTicks(...rows) : ticks(...rows, 5)) {
      const y = this.sy(value);
      make("path", { class: "line", d: `M${MARGIN.left} ${y}H${inside.right}` }, this.svg);
      make("text", { x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" }, this.svg, shown(value));
    }
    for (const value of ticks(...columns, Math.max(4, Math.floor((inside.right - MARGIN.left) / 90)))) {
      if (value >= columns[0] && value <= columns[1]) {
        const x = this.sx(value), anchor = x > inside.right - 20 ? "end" : "middle";
        make("text", { x, y: inside.bottom + 16, "text-anchor": anchor }, this.svg, shown(value));
      }
    }
  }

  point(event) {
    if (!this.lines || !this.lines.length) return;
    const box = this.svg.getBoundingClientRect(), [first] = this.lines, xs = first.series.x;
    const pixels = xs.map(this.sx);
    this.move(xs[nearest(pixels, event.clientX - box.left)]);
  }

  press(event) {
    const way = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (way === undefined || !this.lines || !this.lines.length) return;
    event.preventDefault();
    const xs = this.lines[0].series.x, here = this.at === null ? -1 : nearest(xs, this.at);
    this.move(xs[Math.min(xs.length - 1, Math.max(0, here + way))]);
  }

  move(step) {
    this.at = step;
    if (!this.lines || !this.cross) return;
    if (step === null) {
      this.cross.setAttribute("d", "");
      this.reading.textContent = "";
      return;
    }
    this.cross.setAttribute("d", `M${this.sx(step).toFixed(1)} ${MARGIN.top}V${this.svg.clientHeight - MARGIN.bottom}`);
    const values = this.lines.map(({ series, y }) => {
      const i = nearest(series.x, step), range = series.hi && series.lo[i] !== series.hi[i];
      return `${series.name} ${shown(y[i])}` + (range ? ` (${shown(series.lo[i])} to ${shown(series.hi[i])})` : "");
    });
    this.reading.textContent = `step ${Math.round(step)}: ${values.join(" | ")} ${this.data.unit}`.trim();
  }
}

function controls(charts, options) {
  const place = document.getElementById("controls");
  if (!place) return;
  place.hidden = false;
  const smoothing = tag("label", {}, place, "Smoothing");
  const slider = tag("input", { type: "range", min: "0", max: "0.99", step: "0.01", value: String(options.weight) }, smoothing);
  const output = tag("output", {}, smoothing, shown(options.weight));
  const logarithmic = tag("label", {}, place);
  const box = tag("input", { type: "checkbox" }, logarithmic);
  logarithmic.append("Logarithmic");
  const redraw = () => charts.forEach((chart) => chart.draw());
  slider.addEventListener("input", () => {
    options.weight = Number(slider.value);
    output.textContent = slider.value;
    redraw();
  });
  box.addEventListener("change", () => {
    options.log = box.checked;
    redraw();
  });
}

// --- samples ------------------------------------------------------------------------------------------------------

const TOGETHER = 0.08; // seconds by which clips of a row may differ before they are set right

class RowPlayer {
  constructor(head) {
    this.players = [...head.parentElement.querySelectorAll("video, audio")];
    if (this.players.length < 2) return;
    this.button = tag("button", { type: "button" }, head, "Play row");
    this.button.setAttribute("aria-label", `Play all of ${head.dataset.row} together, with the sound of the last one`);
    this.button.addEventListener("click", () => (this.timer ? this.pause() : this.play()));
  }

  async play() {
    this.button.textContent = "Pause row";
    this.lead = this.players[this.players.length - 1];
    this.timer = setInterval(() => this.align(), 250);
    for (const player of this.players) {
      player.muted = player !== this.lead; // the newest one is heard
      player.loop = true;
      player.preload = "auto";
    }
    await Promise.all(this.players.map((player) => ready(player)));
    if (!this.timer) return;
    for (const player of this.players) player.currentTime = 0;
    await Promise.allSettled(this.players.map((player) => player.play()));
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    this.button.textContent = "Play row";
    for (const player of this.players) {
      player.pause();
      player.muted = false;
      player.loop = false;
    }
  }

  align() {
    for (const player of this.players) {
      if (player !== this.lead && Math.abs(player.currentTime - this.lead.currentTime) > TOGETHER && this.lead.currentTime < player.duration) {
        player.currentTime = this.lead.currentTime;
      }
    }
  }
}

function ready(player) {
  if (player.readyState >= 3) return Promise.resolve();
  player.load();
  return new Promise((done) => {
    player.addEventListener("canplay", done, { once: true });
    player.addEventListener("error", done, { once: true });
    setTimeout(done, 3000);
  });
}

function start() {
  const data = JSON.parse(document.getElementById("data").textContent), options = { weight: 0, log: false };
  const longest = Math.max(0, ...data.charts.flatMap((chart) => chart.series.map((series) => series.y.length)));
  options.weight = longest >= 100 ? 0.9 : 0;
  const charts = [...document.querySelectorAll("[data-chart]")].map((figure) => new Chart(figure, data.charts[Number(figure.dataset.chart)], options));
  controls(charts, options);
  document.querySelectorAll(".samples").forEach((table) => { table.scrollLeft = table.scrollWidth; }); // the newest samples first
  document.querySelectorAll("[data-row]").forEach((head) => new RowPlayer(head));
}

if (typeof document !== "undefined") start();
if (typeof module !== "undefined") module.exports = { smoothed, ticks, logTicks, shown, nearest, extent, scale, path, band };
