// The details of one process, and what may be done to it. Nothing is done without a second, named button.

import { attachedTone, attachedWords, processTone, processWords } from "./states.js";
import { ago, byId, bytes, duration, h, NOTHING, number, percent, put, putData, ranges } from "./text.js";

const MEASURE_MS = 2_000;
const TOLD_MS = 8_000;
const ROLES = ["prefill", "decode", "hybrid"];
// What each action means for requests, and whether they can finish first.
const ACTIONS = {
  restart: { word: "Restart", drains: true, means: "It is stopped and started again. Streams go on at other engines." },
  drain: {
    word: "Drain",
    drains: false,
    means: "It gets no new requests and finishes those that it has. It stays up until it is started or restarted.",
  },
  stop: {
    word: "Stop",
    drains: true,
    means: "It stays stopped until somebody starts it. Streams go on at other engines.",
  },
  start: { word: "Start", drains: false, means: "It is started, or takes requests again after a drain." },
};

/** The dialog. `call(method, path)`: asks the server. */
export class Actions {
  constructor(call) {
    this.call = call;
    this.dialog = byId("details");
    this.body = byId("details-body");
    this.buttons = byId("details-actions");
    this.view = null;
    this.name = null;
    this.measured = null;
    this.dialog.addEventListener("close", () => this.closed());
    byId("details-close").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close());
  }

  open(name) {
    this.name = name;
    this.measured = null;
    put(byId("details-title"), name);
    this.draw(this.view);
    this.offer();
    this.dialog.showModal();
    this.measure();
    this.timer = setInterval(() => this.measure(), MEASURE_MS);
  }

  closed() {
    clearInterval(this.timer);
    this.name = null;
  }

  async measure() {
    const name = this.name;
    const found = await this.call("GET", "/api/measured").catch(() => null);
    if (found === null || this.name !== name) return;
    this.measured = found.processes.find((process) => process.name === name) ?? null;
    this.draw(this.view);
  }

  /** Show what is known now, if the dialog is open. */
  draw(view) {
    this.view = view;
    if (this.name === null || view === null) return;
    const process = view.service.processes.find((one) => one.name === this.name);
    const attached = view.service.attached.find((one) => one.name === this.name);
    putData(
      this.dialog,
      "tone",
      process ? processTone(process) : attached ? attachedTone(attached, view.silent) : "idle",
    );
    const facts = process
      ? factsOf(process, this.measured, view)
      : attached
        ? factsOfAttached(attached, view)
        : [["State", "gone"]];
    const text = JSON.stringify(facts);
    if (text === this.shown && this.body.firstChild) return;
    this.shown = text;
    this.body.replaceChildren(
      h("dl", { class: "facts" }, ...facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
    );
  }

  /** The buttons of what may be done. */
  offer() {
    const process = this.view.service.processes.find((one) => one.name === this.name);
    if (!process) {
      this.buttons.replaceChildren(h("p", { class: "hint" }, "pdctl uses this engine, but does not start it."));
      return;
    }
    if (!this.view.about.write) {
      this.buttons.replaceChildren(
        h(
          "p",
          { class: "hint" },
          "This link only shows the service. For one that may change it: ",
          h("code", {}, "pdctl dash --write"),
        ),
      );
      return;
    }
    const isEngine = ROLES.includes(process.role);
    const verbs = this.view.about.verbs.filter((verb) => verb in ACTIONS && (verb !== "drain" || isEngine));
    const rank = Object.keys(ACTIONS);
    verbs.sort((a, b) => rank.indexOf(a) - rank.indexOf(b));
    const row = h(
      "div",
      { class: "actions" },
      ...verbs.map((verb) => this.button(ACTIONS[verb].word, () => this.confirmVerb(process, verb))),
    );
    if (isEngine) row.append(this.button("Change role", () => this.confirmRole(process)));
    this.buttons.replaceChildren(row);
    if (this.wasAsked) row.firstChild.focus();
    this.wasAsked = false;
  }

  button(word, act, kind = "") {
    return h("button", { type: "button", class: `button ${kind}`, on: { click: act } }, word);
  }

  confirmVerb(process, verb) {
    const { word, means, drains } = ACTIONS[verb];
    const box = h("input", { type: "checkbox", checked: true });
    const first =
      drains && ROLES.includes(process.role) ? h("label", { class: "check" }, box, " its requests finish first") : null;
    const path = () =>
      `/api/processes/${encodeURIComponent(process.name)}/${verb}${first && box.checked ? "?drain=1" : ""}`;
    this.confirm(`${word} ${process.name}?`, means, first, word, () =>
      this.carryOut(path(), `${word} ${process.name}`),
    );
  }

  confirmRole(process) {
    const choice = h(
      "select",
      { "aria-label": "New role" },
      ...ROLES.filter((role) => role !== process.role).map((role) => h("option", { value: role }, role)),
    );
    const label = h("label", { class: "check" }, "New role ", choice);
    const means = `It is ${process.role} now. Requests that it has go on; new ones come for its new role.`;
    const path = () => `/api/processes/${encodeURIComponent(process.name)}/role?to=${choice.value}`;
    this.confirm(`Change the role of ${process.name}?`, means, label, "Change role", () =>
      this.carryOut(path(), `${process.name} becomes ${choice.value}`),
    );
  }

  confirm(question, means, option, word, act) {
    const yes = this.button(word, act, "strong");
    const no = this.button("Cancel", () => {
      this.wasAsked = true;
      this.offer();
    });
    this.buttons.replaceChildren(
      h(
        "div",
        { class: "confirm", role: "group", "aria-label": question },
        h("h3", {}, question),
        h("p", {}, means),
        ...(option ? [option] : []),
        h("div", { class: "actions" }, yes, no),
      ),
    );
    no.focus();
  }

  async carryOut(path, what) {
    const reason = await this.call("POST", path).then(
      () => "",
      (failure) => failure.message,
    );
    tell(reason ? `${what}: ${reason}` : `${what}: begun`, reason ? "bad" : "good");
    this.wasAsked = true;
    if (this.name !== null) this.offer();
  }
}

/** Say something at the page's foot for a while. */
export function tell(words, tone) {
  const told = byId("told");
  put(told, words);
  putData(told, "tone", tone);
  putData(told, "shown", "true");
  clearTimeout(tell.timer);
  tell.timer = setTimeout(() => putData(told, "shown", "false"), TOLD_MS);
}

function factsOf(process, measured, view) {
  const ready = process.ready_since
    ? duration(Math.max(0, Math.floor(view.now - Date.parse(process.ready_since) / 1000)))
    : NOTHING;
  const last = process.last_exit;
  const devices = [
    process.gpus.join(", "),
    process.cpus.length ? `CPU ${ranges(process.cpus)}` : "",
    process.rdma.join(", "),
  ]
    .filter(Boolean)
    .join(" · ");
  const cpu =
    measured && measured.cpu_percent !== null
      ? `${number(Math.round(measured.cpu_percent))}\u202f% of a core`
      : NOTHING;
  return [
    ["State", processWords(process)],
    ["Role", process.planned_role ? `${process.role} (in the topology: ${process.planned_role})` : process.role],
    ["Kind", process.kind === process.role ? process.kind : `${process.kind}, group ${process.group}`],
    ["Ready for", ready],
    ["Restarts", number(process.restarts)],
    ["Last exit", last ? `${last.reason}, ${ago(view.now - Date.parse(last.at) / 1000)}` : "none"],
    ["CPU time, memory", `${cpu}, ${bytes(measured?.rss_bytes ?? null)}`],
    ...loadFacts(measured),
    ["Process id, start", `${process.pid ?? NOTHING}, ${process.epoch || NOTHING}`],
    ["Devices", devices || process.device],
    [
      "Ports",
      Object.entries(process.ports)
        .map(([name, port]) => `${name} ${port}`)
        .join(", ") || NOTHING,
    ],
    ["Log", process.log],
  ];
}

function loadFacts(measured) {
  if (!measured || measured.running === null || measured.running === undefined) return [];
  const hits =
    measured.prefix_hit_rate === null ? "" : `, ${percent(measured.prefix_hit_rate)} of prompts from the cache`;
  return [
    [
      "Load",
      `${number(measured.running)} computed, ${number(measured.waiting)} wait, ${number(measured.leases)} leases`,
    ],
    ["KV", `${percent(measured.kv_used)} in use${hits}`],
    ...(measured.attention ? [["Attention", measured.attention]] : []),
  ];
}

function factsOfAttached(engine, view) {
  return [
    ["State", attachedWords(engine, view.silent)],
    ["Role", engine.role],
    ["Kind", engine.kind],
    ["Address", `${engine.host}:${engine.port}`],
    [
      "Ports",
      Object.entries(engine.ports)
        .map(([name, port]) => `${name} ${port}`)
        .join(", ") || NOTHING,
    ],
    ["Connector", engine.connector || NOTHING],
    ["Known from", engine.registered ? "its own registration" : "the topology"],
  ];
}
