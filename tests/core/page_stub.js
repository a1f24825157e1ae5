// Runs the report's script over a stand-in for a browser's document: `node page_stub.js report.js data.json`, and prints what it drew.
// The stand-in knows just what the script uses, so an unknown call fails the test.
"use strict";
const fs = require("fs"), vm = require("vm");

class Element {
  constructor(name) {
    Object.assign(this, { name, attributes: {}, children: [], listeners: {}, dataset: {}, parentElement: null, clientWidth: 400, clientHeight: 240, own: "" });
  }
  setAttribute(key, value) { this.attributes[key] = String(value); if (key === "value") this.value = String(value); }
  adopt(node) {
    const child = typeof node === "string" ? Object.assign(new Element("#text"), { own: node }) : node;
    child.parentElement = this;
    return child;
  }
  append(...nodes) { this.children.push(...nodes.map((node) => this.adopt(node))); }
  after(...nodes) { this.parentElement.append(...nodes); }
  replaceChildren() { this.children = []; }
  addEventListener(kind, act) { (this.listeners[kind] ||= []).push(act); }
  fire(kind, event = {}) { for (const act of this.listeners[kind] || []) act({ preventDefault() {}, ...event }); }
  getBoundingClientRect() { return { left: 10, top: 0, width: this.clientWidth, height: this.clientHeight }; }
  querySelector(name) { return this.querySelectorAll(name)[0]; }
  querySelectorAll(names) {
    const wanted = names.split(", "), below = this.children.flatMap((child) => [child, ...child.querySelectorAll(names)]);
    return below.filter((child) => wanted.includes(child.name));
  }
  get textContent() { return this.own + this.children.map((child) => child.textContent).join(""); }
  set textContent(text) { this.children = []; this.own = text; }
}

class Player extends Element {
  constructor() { super("video"); Object.assign(this, { readyState: 4, currentTime: 7, duration: 9, muted: false, paused: true, loop: false }); }
  play() { this.paused = false; return Promise.resolve(); }
  pause() { this.paused = true; }
}

const content = fs.readFileSync(process.argv[3], "utf8"), charts = JSON.parse(content).charts;
const figures = charts.map((_, index) => {
  const figure = new Element("figure");
  figure.dataset.chart = String(index);
  figure.append(new Element("figcaption"));
  return figure;
});
const row = new Element("tr"), head = new Element("th"), players = [new Player(), new Player()];
head.dataset.row = "first";
row.append(head, ...players);
const ids = { data: Object.assign(new Element("script"), { own: content }), controls: Object.assign(new Element("div"), { hidden: true }) };
const document = {
  getElementById: (id) => ids[id],
  querySelectorAll: (selector) => ({ "[data-chart]": figures, "[data-row]": [head], ".samples": [] })[selector],
  createElement: (name) => new Element(name),
  createElementNS: (_, name) => new Element(name),
};
class ResizeObserver {
  constructor(act) { this.act = act; }
  observe() { this.act(); }
}

(async () => {
  let ticking = null;
  const timers = { setInterval: (act) => (ticking = act), clearInterval: () => { ticking = null; }, setTimeout };
  vm.runInNewContext(fs.readFileSync(process.argv[2], "utf8"), { document, ResizeObserver, console, ...timers });
  const [figure] = figures, plot = figure.querySelector("svg"), [legend, reading] = figure.children.slice(2);
  const lines = () => plot.querySelectorAll("path").filter((line) => (line.attributes.stroke || "").startsWith("var(--c")).map((line) => line.attributes.d);
  const told = { label: plot.attributes["aria-label"], controls: !ids.controls.hidden, plots: figures.map((f) => f.querySelector("svg").querySelectorAll("path").length) };
  told.lines = lines();
  plot.fire("pointermove", { clientX: 10 + 52 });
  told.pointed = reading.textContent;
  plot.fire("keydown", { key: "ArrowRight" });
  told.right = reading.textContent;
  plot.fire("keydown", { key: "End" });
  told.end = reading.textContent;
  plot.fire("pointerleave");
  told.left = reading.textContent;
  const [button] = legend.querySelectorAll("button");
  button.fire("click");
  told.pressed = [button.attributes["aria-pressed"], lines().length];
  button.fire("click");
  const [slider, box] = ids.controls.querySelectorAll("input");
  slider.value = "0.5";
  slider.fire("input");
  told.smoothed = lines().length;
  box.checked = true;
  box.fire("change");
  told.logarithmic = lines().length;
  const [play] = head.querySelectorAll("button");
  play.fire("click");
  await new Promise((done) => setTimeout(done, 20));
  told.playing = players.map((player) => [player.paused, player.currentTime, player.muted, player.loop]);
  [players[0].currentTime, players[1].currentTime] = [1.0, 1.5];
  ticking();
  told.aligned = players.map((player) => player.currentTime);
  play.fire("click");
  told.paused = players.map((player) => [player.paused, player.muted, player.loop]);
  console.log(JSON.stringify(told));
})();
