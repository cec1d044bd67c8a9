// The lists of the page: events, leases, exits and the doctor's findings.

import { eventTone } from "./states.js";
import { ago, byId, bytes, clock, duration, h, keyed, number, plural, put, putData } from "./text.js";

const MOST_EVENTS = 300;
const MOST_LEASES = 40;
const LAST_LINES = 12;
const SEVERITIES = { critical: "bad", warning: "busy", info: "idle", unknown: "idle", ok: "good" };
const ORDER = ["critical", "warning", "unknown", "info", "ok"];

/** Events, newest first. */
export class Events {
  constructor() {
    this.feed = byId("feed");
    this.count = 0;
    byId("events-problems").addEventListener("change", (event) =>
      putData(this.feed, "problems", String(event.target.checked)),
    );
  }

  add(lines, isFirst) {
    if (isFirst) this.feed.replaceChildren();
    for (const event of lines) this.feed.prepend(entry(event));
    while (this.feed.childElementCount > MOST_EVENTS) this.feed.lastChild.remove();
  }
}

function entry(event) {
  const at = new Date(event.at);
  const time = h("time", { datetime: event.at, title: at.toLocaleString() }, clock(at.getTime() / 1000));
  return h(
    "li",
    { data: { tone: eventTone(event) } },
    h("span", { class: "sign", "aria-hidden": "true" }),
    time,
    h("b", {}, event.process),
    h("span", { class: "message" }, event.message),
  );
}

export function drawLeases(view) {
  const { leases, leasesTotal } = view;
  keyed(
    byId("lease-list"),
    leases.slice(0, MOST_LEASES),
    (lease) => `${lease.engine}/${lease.id}`,
    makeLease,
    drawLease,
  );
  const more = leasesTotal - Math.min(leases.length, MOST_LEASES);
  put(byId("leases-hint"), more > 0 ? `and ${number(more)} more: pdctl kv` : "KV that one engine keeps for another.");
  putData(byId("lease-list"), "empty", leasesTotal ? "" : "No KV is leased now.");
}

function makeLease(lease) {
  const head = h(
    "p",
    { class: "line" },
    h("span", { class: "sign", "aria-hidden": "true" }),
    h("b", {}, lease.engine),
    h("span", { class: "grow" }),
    h("span", { class: "size" }),
  );
  return h("li", {}, head, h("p", { class: "sub" }), h("p", { class: "sub" }));
}

function drawLease(node, lease) {
  putData(node, "tone", lease.leak ? "bad" : lease.state === "claimed" ? "good" : "idle");
  const [head, held, request] = node.children;
  put(head.lastChild, `${bytes(lease.bytes)}, ${plural(lease.blocks, "block")}`);
  put(
    held,
    lease.leak
      ? `leak: ${lease.leak}`
      : `${lease.state} by ${lease.holder.split("@")[0]} for ${duration(Math.floor(lease.age_s))}`,
  );
  put(request, `request ${lease.request_id}`);
}

export function drawExits(exits) {
  keyed(byId("exit-list"), exits.slice(0, 50), (exit) => `${exit.process}/${exit.epoch}`, makeExit);
  putData(byId("exit-list"), "empty", exits.length ? "" : "No process has ended in this run.");
}

function makeExit(exit) {
  const at = new Date(exit.at);
  const head = h(
    "p",
    { class: "line" },
    h("span", { class: "sign", "aria-hidden": "true" }),
    h("b", {}, exit.process),
    h("span", { class: "grow" }, exit.reason),
    h("time", { datetime: exit.at, title: at.toLocaleString() }, clock(at.getTime() / 1000)),
  );
  const memory = exit.rusage ? `, peak memory ${bytes(exit.rusage.max_rss_bytes)}` : "";
  const facts = h(
    "p",
    { class: "sub" },
    `${exit.expected ? "as asked" : `by ${exit.by}`} · pid ${exit.pid} · lived ${duration(Math.floor(exit.lived_s))}${memory}`,
  );
  const lines = [...exit.kernel, ...exit.last_lines.slice(-LAST_LINES)];
  const log = lines.length
    ? h("details", {}, h("summary", {}, "last lines"), h("pre", { tabindex: "0" }, lines.join("\n")))
    : null;
  const tone = exit.expected ? "idle" : "bad";
  return h("li", { data: { tone } }, head, facts, log);
}

/** `known`: the server's answer about the doctor's last run. */
export function drawFindings(known, now) {
  const button = byId("doctor-again");
  button.disabled = known.running;
  put(button, known.running ? "Running…" : "Run again");
  const found = [...known.findings].sort((a, b) => ORDER.indexOf(a.severity) - ORDER.indexOf(b.severity));
  const problems = found.filter((one) => one.severity === "critical" || one.severity === "warning").length;
  const when = known.at ? `, ${ago(now - known.at)}` : "";
  put(
    byId("doctor-hint"),
    known.at
      ? `${plural(problems, "problem")} in ${plural(found.length, "check")}${when}`
      : "What is wrong with this machine.",
  );
  const list = byId("finding-list");
  putData(
    list,
    "empty",
    known.error || (found.length ? "" : known.running ? "The doctor looks at this machine." : "No findings."),
  );
  keyed(list, found, (one) => `${known.at}/${one.id}/${one.subject}/${one.observed}`, makeFinding);
}

function makeFinding(one) {
  const head = h(
    "p",
    { class: "line" },
    h("span", { class: "sign", "aria-hidden": "true" }),
    h("b", {}, one.severity),
    h("span", { class: "grow" }, one.observed),
  );
  const parts = [one.cause && h("p", { class: "sub" }, one.cause), one.fix && h("p", { class: "fix" }, one.fix)];
  const facts = [one.id, one.subject, one.expected && `expected ${one.expected}`].filter(Boolean).join(" · ");
  return h(
    "li",
    { data: { tone: SEVERITIES[one.severity] ?? "idle" } },
    head,
    h("p", { class: "sub" }, facts),
    ...parts.filter(Boolean),
  );
}
