// The charts, drawn by uPlot. All have the same time axis and one cursor; legends have the values below it.

import { Samples } from "./samples.js";
import {
  byId,
  clock,
  duration,
  h,
  keyed,
  NOTHING,
  number,
  percent,
  put,
  roundDuration,
  roundWithUnit,
  short,
  withUnit,
} from "./text.js";

const NOW_SPAN = 900;
const SPANS = [
  [900, "15 min", "15 minutes"],
  [3600, "1 h", "hour"],
  [21600, "6 h", "6 hours"],
  [86400, "24 h", "24 hours"],
];
const HEIGHT = 148;
const AXIS_WIDTH = 52;
const AGAIN_MS = 15_000;
const MOST_ENGINES = 8;
const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3]];
const tokens = (value) => withUnit(value, "tok/s");
const perSecond = (value) => withUnit(value, "/s");
const roundPerSecond = (value) => roundWithUnit(value, "/s");

// `unit` writes a value, `tick` a round one. `lines(samples)`: name, values, number of the colour, number of the dash.
const CHARTS = [
  {
    id: "ttft",
    title: "Time to first token",
    unit: duration,
    tick: roundDuration,
    least: 0.05,
    lines: latency("ttft"),
  },
  { id: "itl", title: "Time between tokens", unit: duration, tick: roundDuration, least: 0.01, lines: latency("itl") },
  {
    id: "tokens",
    title: "Throughput, tokens per second",
    unit: tokens,
    tick: short,
    least: 10,
    lines: (samples) => [
      ["output", samples.column("tokens_s"), 2, 0],
      ["prompts", samples.column("prompt_tokens_s"), 1, 1],
    ],
  },
  {
    id: "kv",
    title: "KV in use",
    unit: percent,
    tick: percent,
    height: 128,
    least: 1,
    most: 1,
    lines: (samples) =>
      samples
        .engines("kv")
        .slice(0, MOST_ENGINES)
        .map((name, place) => [
          name,
          samples.column(`${name}/kv`),
          (place % 6) + 1,
          Math.floor(place / 2) % DASHES.length,
        ]),
  },
  {
    id: "queue",
    title: "Queue, requests",
    unit: number,
    tick: short,
    least: 4,
    lines: (samples) => [
      ["computed", samples.sum("running"), 2, 0],
      ["wait in engines", samples.sum("waiting"), 3, 1],
      ["wait in the proxy", samples.column("waiting"), 4, 2],
    ],
  },
  {
    id: "rate",
    title: "Requests per second",
    unit: perSecond,
    tick: roundPerSecond,
    least: 1,
    lines: (samples) => [
      ["answered", samples.column("answered_s"), 2, 0],
      ["failed", samples.column("failed_s"), 5, 1],
    ],
  },
];

function latency(name) {
  return (samples) => [
    ["mean", samples.column(`${name}_mean`), 1, 0],
    ["95th percentile", samples.column(`${name}_p95`), 3, 1],
  ];
}

/** All charts of the page. `onHistory(seconds)`: asks for the samples of a longer time. */
export class Charts {
  constructor(askHistory) {
    this.live = new Samples(NOW_SPAN);
    this.shown = this.live;
    this.now = 0;
    this.askHistory = askHistory;
    const cursor = window.uPlot.sync("time");
    this.charts = CHARTS.map((kind) => new Chart(kind, cursor, (at) => this.pointed(at)));
    byId("chart-grid").append(...this.charts.map((chart) => chart.node));
    byId("spans").append(...SPANS.map((span) => this.button(...span)));
    new ResizeObserver(() => this.charts.forEach((chart) => chart.resize())).observe(byId("chart-grid"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.repaint());
  }

  /** Newer samples have come; all of them if the page is new. */
  add(table, now, isFirst) {
    if (isFirst) this.live.clear();
    this.live.add(table);
    this.now = now;
    if (this.shown === this.live) this.draw();
  }

  draw() {
    for (const chart of this.charts) chart.draw(this.shown, this.now);
  }

  /** The colours have changed. */
  repaint() {
    for (const chart of this.charts) chart.forget();
    this.draw();
  }

  button(seconds, short, name) {
    const pressed = seconds === NOW_SPAN;
    const choose = () => this.choose(seconds, name);
    return h(
      "button",
      { type: "button", "aria-pressed": String(pressed), data: { seconds }, on: { click: choose } },
      short,
    );
  }

  async choose(seconds, name) {
    for (const button of byId("spans").children)
      button.setAttribute("aria-pressed", String(button.dataset.seconds === String(seconds)));
    put(byId("span-name"), name);
    clearInterval(this.again);
    this.shown = this.live;
    if (seconds !== NOW_SPAN) {
      this.shown = new Samples(seconds);
      this.again = setInterval(() => this.refresh(seconds), AGAIN_MS);
      await this.refresh(seconds);
    }
    this.draw();
  }

  async refresh(seconds) {
    if (document.hidden) return;
    const table = await this.askHistory(seconds).catch(() => null);
    if (table === null || this.shown.span !== seconds) return;
    this.shown.columns = table;
    this.draw();
  }

  pointed(at) {
    put(byId("charts-at"), at === null ? "now" : `at ${clock(at)}`);
  }
}

/** One chart with its legend. It is made anew when its lines or its colours change. */
class Chart {
  constructor(kind, cursor, onPoint) {
    this.kind = kind;
    this.height = kind.height ?? HEIGHT;
    this.cursor = cursor;
    this.onPoint = onPoint;
    this.legend = h("ul", { class: "legend" });
    this.canvas = h("div", {
      class: "canvas",
      role: "img",
      tabindex: "0",
      on: { keydown: (event) => this.key(event) },
    });
    this.node = h(
      "figure",
      { class: "panel chart", id: `chart-${kind.id}` },
      h("h3", {}, kind.title),
      this.legend,
      this.canvas,
    );
    this.plot = null;
    this.names = "";
  }

  draw(samples, now) {
    const lines = this.kind.lines(samples);
    const names = lines.map(([name]) => name).join("/");
    if (this.plot === null || names !== this.names) this.make(lines, names);
    this.lines = lines;
    this.range = [now - samples.span, now];
    this.plot.setData([samples.columns.at, ...lines.map(([, values]) => values)], false);
    this.plot.setScale("x", { min: this.range[0], max: this.range[1] });
    this.tell();
  }

  forget() {
    this.plot?.destroy();
    this.plot = null;
  }

  resize() {
    if (this.plot && this.canvas.clientWidth)
      this.plot.setSize({ width: this.canvas.clientWidth, height: this.height });
  }

  make(lines, names) {
    this.forget();
    this.names = names;
    const options = {
      width: this.canvas.clientWidth || 300,
      height: this.height,
      padding: [8, 8, 0, 0],
      legend: { show: false },
      cursor: { sync: { key: this.cursor.key }, y: false, drag: { x: false, y: false }, points: { size: 6 } },
      scales: { x: { time: true }, y: { range: (_, __, high) => this.heights(high) } },
      axes: [
        axis({ values: (_, ticks) => ticks.map((at) => clock(at, false)), space: 64, size: 26 }),
        axis({ values: (_, ticks) => ticks.map(this.kind.tick), size: AXIS_WIDTH, space: 34 }),
      ],
      series: [{}, ...lines.map(line)],
      hooks: { setCursor: [() => this.tell()] },
    };
    this.plot = new window.uPlot(options, [[], ...lines.map(() => [])], this.canvas);
  }

  heights(high) {
    return [0, this.kind.most ?? Math.max(this.kind.least, (high ?? 0) * 1.15)];
  }

  /** The legend: values under the cursor, else the newest. */
  tell() {
    if (!this.lines) return;
    const at = this.plot.cursor.idx ?? null;
    const pointed = at === null || this.plot.cursor.left < 0 ? null : at;
    this.onPoint(pointed === null ? null : this.plot.data[0][pointed]);
    const told = this.lines.map(([name, values, colour, dash]) => {
      const value = pointed === null ? newest(values) : values[pointed];
      return { name, colour, dash, text: value === null || value === undefined ? NOTHING : this.kind.unit(value) };
    });
    keyed(
      this.legend,
      told,
      (one) => one.name,
      legendEntry,
      (node, one) => put(node.lastChild, one.text),
    );
    const words = told.map((one) => `${one.name} ${one.text}`).join(", ");
    this.canvas.setAttribute("aria-label", `${this.kind.title}: ${words}. The arrow keys move the cursor.`);
  }

  /** Arrow keys move the cursor of all charts. */
  key(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") this.plot.setCursor({ left: -10, top: -10 });
    if (!by || !this.plot.data[0].length) return;
    event.preventDefault();
    const last = this.plot.data[0].length - 1;
    const step = event.shiftKey ? 30 : 5;
    const from = this.plot.cursor.left >= 0 ? (this.plot.cursor.idx ?? last) : last;
    const to = Math.max(0, Math.min(last, from + by * step));
    this.plot.setCursor({ left: this.plot.valToPos(this.plot.data[0][to], "x"), top: 10 });
  }
}

function axis(more) {
  const [text, lines] = [colourOf("--muted"), colourOf("--grid")];
  return {
    stroke: text,
    font: "11px system-ui, sans-serif",
    grid: { stroke: lines, width: 1 },
    ticks: { show: false },
    gap: 6,
    ...more,
  };
}

function line([, , colour, dash]) {
  const stroke = colourOf(`--series-${colour}`);
  return {
    stroke,
    width: 1.75,
    dash: DASHES[dash],
    spanGaps: false,
    points: { show: false, filter: lonely, size: 4, fill: stroke, stroke },
  };
}

/** Values without a neighbour have no line: they are drawn as points. */
function lonely(plot, series) {
  const values = plot.data[series];
  const found = [];
  const isKnown = (value) => value !== null && value !== undefined;
  for (let place = 0; place < values.length; place += 1) {
    if (isKnown(values[place]) && !isKnown(values[place - 1]) && !isKnown(values[place + 1])) found.push(place);
  }
  return found.length ? found : null;
}

function legendEntry({ name, colour, dash }) {
  const key = h("span", { class: "key", data: { colour, dash } });
  return h("li", {}, key, h("span", { class: "name" }, name), h("b", {}, NOTHING));
}

function newest(values) {
  // A sample without requests has no latency: that of the last ones counts for a while.
  for (let back = 1; back <= 30 && back <= values.length; back += 1) {
    const value = values.at(-back);
    if (value !== null && value !== undefined) return value;
  }
  return null;
}

/** A colour of the style sheet as the browser resolves it for light or dark. */
function colourOf(name) {
  const probe = h("i");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}
