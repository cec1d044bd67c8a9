// The topology as a picture: hosts, what runs there and on which device, by role, and the links between engines.

import { drawWires } from "./wires.js";
import {
  attachedTone,
  attachedWords,
  isEngine,
  linkName,
  linkTone,
  linkWhy,
  processTone,
  processWords,
} from "./states.js";
import {
  byId,
  bytes,
  h,
  keyed,
  NOTHING,
  number,
  percent,
  put,
  putAttribute,
  putData,
  ranges,
  withUnit,
} from "./text.js";

const COLUMNS = [
  ["prefill", "Prefill"],
  ["hybrid", "Hybrid"],
  ["decode", "Decode"],
];
const LOOPBACK = /^(127\.|localhost$|::1$)/;

/** The picture and the table of links. `onChoose(name)`: somebody wants to see a process. */
export class Topology {
  constructor(onChoose) {
    this.onChoose = onChoose;
    this.view = null;
    const picture = byId("picture");
    this.hosts = picture.querySelector(".hosts");
    this.links = byId("links").querySelector("tbody");
    new ResizeObserver(() => this.view && drawWires(picture, this.view.service.links)).observe(picture);
  }

  draw(view) {
    this.view = view;
    const nodes = nodesOf(view);
    const roles = COLUMNS.filter(([role]) => nodes.some((node) => node.role === role));
    const hosts = hostsOf(nodes, view.about);
    keyed(
      this.hosts,
      hosts,
      (host) => host.name,
      (host) => this.makeHost(host),
      (frame, host) => this.drawHost(frame, host, roles),
    );
    keyed(this.links, view.service.links, (link) => `${link.peer}>${link.reader}`, makeLink, drawLink);
    byId("links").hidden = view.service.links.length === 0;
    drawWires(byId("picture"), view.service.links);
  }

  makeHost(host) {
    const head = h("div", { class: "host-head" }, h("h3", {}, host.name), h("p", { class: "devices" }));
    return h("div", { class: "host" }, head, h("div", { class: "bar" }), h("div", { class: "columns" }));
  }

  drawHost(frame, host, roles) {
    const [head, bar, columns] = frame.children;
    put(head.lastChild, host.devices);
    keyed(
      bar,
      host.nodes.filter((node) => node.kind === "other"),
      (node) => node.name,
      (node) => this.makeCard(node),
      drawCard,
    );
    bar.hidden = bar.childElementCount === 0;
    putData(columns, "count", String(roles.length));
    keyed(
      columns,
      roles,
      ([role]) => role,
      makeColumn,
      (column, [role]) => {
        const engines = host.nodes.filter((node) => node.kind === "engine" && node.role === role);
        putData(column, "empty", String(engines.length === 0));
        keyed(
          column.lastChild,
          engines,
          (node) => node.name,
          (node) => this.makeCard(node),
          drawCard,
        );
      },
    );
  }

  makeCard(node) {
    const name = h(
      "button",
      { type: "button", class: "card-name", on: { click: () => this.onChoose(node.name) } },
      node.name,
    );
    const head = h(
      "div",
      { class: "card-head" },
      h("span", { class: "sign", "aria-hidden": "true" }),
      name,
      h("span", { class: "role" }),
    );
    const state = h("p", { class: "card-state" });
    const parts = [head, state];
    if (node.kind === "engine") {
      const meter = h("div", { class: "meter" }, h("span", {}, "KV"), h("div", { class: "track" }, h("i")), h("b"));
      parts.push(
        meter,
        h(
          "dl",
          { class: "loads" },
          ...["computes", "waiting", "output"].map((word) => h("div", {}, h("dt", {}, word), h("dd"))),
        ),
      );
    }
    parts.push(h("p", { class: "device" }, h("span", { class: "chip" }), h("span", { class: "restarts" })));
    return h("article", { class: `card ${node.kind}`, data: { name: node.name } }, ...parts);
  }
}

function makeColumn([role, title]) {
  return h("div", { class: "column", data: { role } }, h("h4", {}, title), h("div", { class: "cards" }));
}

function drawCard(card, node) {
  putData(card, "tone", node.tone);
  putData(card, "role", node.role);
  const [head, state] = card.children;
  put(head.lastChild, node.role);
  put(state, node.words);
  putAttribute(state, "title", node.words);
  const device = card.lastChild;
  put(device.firstChild, node.device);
  putAttribute(device.firstChild, "title", node.device);
  put(
    device.lastChild,
    node.restarts ? `${number(node.restarts)} ${node.restarts === 1 ? "restart" : "restarts"}` : "",
  );
  if (node.kind === "engine") drawLoad(card.children[2], card.children[3], node.live);
}

function drawLoad(meter, loads, live) {
  const part = live?.kv_used ?? null;
  meter.querySelector("i").style.width = `${Math.round((part ?? 0) * 1000) / 10}%`;
  putData(meter, "full", String((part ?? 0) > 0.9));
  put(meter.lastChild, percent(part));
  const [computes, waits, output] = [...loads.children].map((one) => one.lastChild);
  put(computes, live ? number(live.running) : NOTHING);
  put(waits, live ? number(live.waiting) : NOTHING);
  put(output, live && live.tokens_s !== null ? withUnit(live.tokens_s, "tok/s") : NOTHING);
}

/** Everything that the picture has a card for. */
function nodesOf(view) {
  const { service, engines, silent } = view;
  const started = service.processes.map((process) => ({
    name: process.name,
    role: process.role,
    kind: isEngine(process) ? "engine" : "other",
    host: "",
    gpus: process.gpus,
    tone: process.state === "ready" && process.name in silent ? "busy" : processTone(process),
    words:
      process.state === "ready" && process.name in silent
        ? `ready · does not answer: ${silent[process.name]}`
        : processWords(process),
    device: deviceOf(process, view),
    restarts: process.restarts,
    live: process.state === "ready" || process.state === "draining" ? engines[process.name] : undefined,
  }));
  const attached = service.attached.map((engine) => ({
    name: engine.name,
    role: engine.role,
    kind: "engine",
    host: LOOPBACK.test(engine.host) ? "" : engine.host,
    gpus: [],
    tone: attachedTone(engine, silent),
    words: attachedWords(engine, silent),
    device: `${engine.kind} at ${engine.host}:${engine.port}`,
    restarts: 0,
    live: engines[engine.name],
  }));
  return [...started, ...attached];
}

function deviceOf(process, { about: { gpus }, service }) {
  if (process.role === "proxy") return service.proxy_url;
  const named = process.gpus.map((uuid) => gpus.find((gpu) => gpu.uuid === uuid));
  if (named.length && named.every(Boolean)) {
    const models = [...new Set(named.map((gpu) => gpu.name))].join(", ");
    return `GPU ${ranges(named.map((gpu) => gpu.index))} · ${models}`;
  }
  if (process.gpus.length) return `GPU ${process.gpus.join(", ")}`;
  return process.cpus.length ? `CPU ${ranges(process.cpus)}` : process.device;
}

/** The hosts with their nodes, this machine first. */
function hostsOf(nodes, about) {
  const names = [...new Set(["", ...nodes.map((node) => node.host)])];
  return names.map((name) => {
    const here = nodes.filter((node) => node.host === name);
    return { name: name || about.machine, nodes: here, devices: name ? "another host" : gpuWords(about.gpus, here) };
  });
}

function gpuWords(gpus, nodes) {
  if (!gpus.length) return "no GPU";
  const used = new Set(nodes.flatMap((node) => node.gpus));
  const unused = gpus.filter((gpu) => !used.has(gpu.uuid));
  const kinds = [...new Set(gpus.map((gpu) => `${gpu.name}, ${bytes(gpu.memory)}`))].join("; ");
  return `${gpus.length} × ${kinds}${unused.length ? ` · unused: GPU ${ranges(unused.map((gpu) => gpu.index))}` : ""}`;
}

function makeLink() {
  return h(
    "tr",
    {},
    ...["", "", "", "number", "number", "number", "why"].map((name) => h("td", name ? { class: name } : {})),
  );
}

function drawLink(row, link) {
  putData(row, "tone", linkTone(link));
  const cells = [
    link.peer,
    link.reader,
    linkName(link),
    speed(link),
    link.pulls ? bytes(link.bytes) : NOTHING,
    number(link.pulls),
    linkWhy(link),
  ];
  cells.forEach((text, place) => put(row.children[place], text));
  putAttribute(row.lastChild, "title", linkWhy(link));
}

export function speed(link) {
  return link.gbps > 0 ? withUnit(link.gbps, "GB/s") : NOTHING;
}
