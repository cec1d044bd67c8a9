// The last requests, and the timeline of one: what the proxy, prefill, the hand-over and decode did, and what failed.

import {
  byId,
  bytes,
  clock,
  duration,
  h,
  keyed,
  NOTHING,
  number,
  plural,
  putAttribute,
  putData,
  roundDuration,
} from "./text.js";

const MOST = 60;
const NAMES = {
  queue: "queue",
  prefill: "prefill",
  hand_over: "hand-over",
  admission: "admission",
  first_step: "first step",
  decode: "decode",
};
// A phase is at least so wide, so that it can be seen, in percent.
const LEAST_WIDTH = 0.4;
const PROXY = "proxy";

/** The table of requests and the timeline of the chosen one. */
export class Requests {
  constructor() {
    this.body = byId("request-table").querySelector("tbody");
    this.rows = this.body.closest(".rows");
    this.chosen = null;
    this.known = [];
    putData(this.rows, "empty", "No request has ended since the page was opened.");
    byId("timeline").append(h("p", { class: "nothing" }, "The timeline of a request comes here."));
  }

  /** Newest first. The chosen one stays, even when it is not among the last ones any more. */
  draw(requests) {
    this.known = requests.slice(0, MOST);
    if (requests.length) putData(this.rows, "empty", "");
    if (this.chosen === null && requests.length) this.choose(requests[0]);
    keyed(
      this.body,
      this.known,
      (request) => request.id,
      (request) => this.makeRow(request),
      (row) => this.mark(row),
    );
  }

  choose(request) {
    this.chosen = request;
    for (const row of this.body.children) this.mark(row);
    byId("timeline").replaceChildren(...timeline(request));
  }

  mark(row) {
    const isChosen = row.dataset.id === this.chosen?.id;
    putData(row, "chosen", String(isChosen));
    putAttribute(row.querySelector("button"), "aria-pressed", String(isChosen));
  }

  makeRow(request) {
    const [tone, words] = result(request);
    const button = h(
      "button",
      { type: "button", "aria-label": `Timeline of request ${request.id}` },
      clock(request.at + request.seconds),
    );
    const pair =
      request.prefill && request.prefill !== request.decode
        ? `${request.prefill} → ${request.decode || NOTHING}`
        : request.decode || NOTHING;
    const row = h(
      "tr",
      { data: { id: request.id, tone }, on: { click: () => this.choose(request) } },
      h("td", {}, button),
      h("td", {}, h("span", { class: "sign", "aria-hidden": "true" }), words),
      h("td", { class: "number" }, `${number(request.prompt_tokens)} → ${number(request.output_tokens)}`),
      h("td", { class: "number" }, duration(request.ttft_s)),
      h("td", { class: "number" }, duration(request.seconds)),
      h("td", {}, pair),
      h("td", { class: "shape" }, shape(request)),
    );
    row.addEventListener("keydown", (event) => step(event, row));
    return row;
  }
}

/** Arrow keys go from row to row. */
function step(event, row) {
  const next = { ArrowUp: row.previousElementSibling, ArrowDown: row.nextElementSibling }[event.key];
  if (!next) return;
  event.preventDefault();
  next.querySelector("button").focus();
  next.click();
}

function result(request) {
  if (request.status >= 400) return ["bad", `${request.status}`];
  if (request.failed.length) return ["busy", `${request.status}, ${plural(request.failed.length, "failover")}`];
  return ["good", `${request.status}`];
}

/** The phases as a thin bar. */
function shape(request) {
  const bar = h("span", { class: "strip", "aria-hidden": "true" });
  for (const part of parts(request)) bar.append(block(part, request));
  return bar;
}

/** Every part of a request with its lane, in order of time; failed tries are parts, too. */
function parts(request) {
  const queue = request.phases.find((phase) => phase.name === "queue");
  let began = queue?.end_s ?? 0;
  const failed = request.failed.map((one) => {
    const part = { name: "failed", lane: one.engine || one.decode || PROXY, begin_s: began, end_s: one.at_s, one };
    began = one.at_s;
    return part;
  });
  return [...request.phases.map((phase) => ({ ...phase, lane: phase.engine || PROXY })), ...failed];
}

function block(part, request) {
  const node = h("span", { class: "phase", data: { phase: part.name } });
  const whole = request.seconds || 1;
  node.style.left = `${(100 * part.begin_s) / whole}%`;
  node.style.width = `${Math.max(LEAST_WIDTH, (100 * (part.end_s - part.begin_s)) / whole)}%`;
  return node;
}

function timeline(request) {
  const all = parts(request);
  const lanes = [
    ...new Set([PROXY, request.prefill, ...request.failed.map((one) => one.engine), request.decode].filter(Boolean)),
  ];
  const head = h(
    "p",
    { class: "timeline-head" },
    h("b", {}, request.id),
    ` ${request.path} · `,
    `${number(request.prompt_tokens)} prompt tokens${request.cached_tokens ? ` (${number(request.cached_tokens)} cached)` : ""}, ${number(request.output_tokens)} output`,
    request.hand_over_bytes ? ` · ${bytes(request.hand_over_bytes)} of KV` : "",
  );
  const chart = h(
    "div",
    { class: "lanes", role: "img", "aria-label": said(request, all) },
    ...lanes.map((lane) => laneOf(lane, all, request)),
    scale(request),
  );
  return [head, chart, legend(all, request), notes(request)];
}

function laneOf(lane, all, request) {
  const track = h("div", { class: "lane-track" });
  for (const part of all.filter((one) => one.lane === lane)) {
    const node = block(part, request);
    node.title = part.one
      ? failedWords(part.one)
      : `${NAMES[part.name] ?? part.name} ${duration(part.end_s - part.begin_s)}`;
    track.append(node);
  }
  if (request.ttft_s !== null) {
    const mark = h("i", { class: "first-token", title: `first token after ${duration(request.ttft_s)}` });
    mark.style.left = `${(100 * request.ttft_s) / (request.seconds || 1)}%`;
    track.append(mark);
  }
  return h("div", { class: "lane" }, h("span", { class: "lane-name" }, lane), track);
}

/** Ticks at round times. */
function scale(request) {
  const track = h("div", { class: "lane-track" });
  const by = roundStep(request.seconds / 4);
  for (let at = 0; at <= request.seconds * 0.97; at += by) {
    const tick = h("span", {}, roundDuration(at));
    tick.style.left = `${(100 * at) / (request.seconds || 1)}%`;
    track.append(tick);
    if (!(by > 0)) break;
  }
  return h("div", { class: "lane scale", "aria-hidden": "true" }, h("span", { class: "lane-name" }), track);
}

function roundStep(step) {
  if (!(step > 0)) return 0;
  const size = 10 ** Math.floor(Math.log10(step));
  return size * [1, 2, 5, 10].find((times) => size * times >= step);
}

function legend(all, request) {
  const entries = all.map((part) =>
    h(
      "li",
      {},
      h("span", { class: "key", data: { phase: part.name } }),
      part.one ? "failed try" : (NAMES[part.name] ?? part.name),
      h("b", {}, duration(part.end_s - part.begin_s)),
    ),
  );
  if (request.ttft_s !== null) {
    entries.push(
      h(
        "li",
        {},
        h("span", { class: "key", data: { phase: "first_token" } }),
        "first token",
        h("b", {}, duration(request.ttft_s)),
      ),
    );
  }
  return h("ul", { class: "legend phases" }, ...entries);
}

function notes(request) {
  const lines = request.failed.map((one) =>
    h("li", { data: { tone: "bad" } }, h("span", { class: "sign", "aria-hidden": "true" }), failedWords(one)),
  );
  if (request.moved_s !== null) {
    lines.push(
      h(
        "li",
        { data: { tone: "idle" } },
        h("span", { class: "sign", "aria-hidden": "true" }),
        `after ${duration(request.moved_s)} its stream was moved to another engine`,
      ),
    );
  }
  return h("ul", { class: "notes" }, ...lines);
}

function failedWords(one) {
  const sent = one.tokens ? ` and ${plural(one.tokens, "token")}` : "";
  return `${one.engine || "the try"} failed after ${duration(one.at_s)}${sent}: ${one.reason}. The request went on elsewhere.`;
}

function said(request, all) {
  const words = all.map((part) =>
    part.one
      ? failedWords(part.one)
      : `${NAMES[part.name] ?? part.name} ${duration(part.end_s - part.begin_s)} at ${part.lane}`,
  );
  return `Request of ${duration(request.seconds)}: ${words.join(", ")}`;
}
