// The live page: it follows the service, and gives each part what that part shows.

import { Actions } from "./actions.js";
import { Charts } from "./charts.js";
import { drawExits, drawFindings, drawLeases, Events } from "./lists.js";
import { Requests } from "./requests.js";
import { call, follow, takeToken } from "./server.js";
import { isSilent, linkTone, processTone, serviceTone } from "./states.js";
import { ago, byId, bytes, number, plural, put, putData } from "./text.js";
import { Topology } from "./topology.js";

const REQUESTS_MS = 2_000;
const FINDINGS_MS = 1_500;
const THEME = "pdctl-theme";

const view = { about: null, service: null, engines: {}, silent: {}, leases: [], leasesTotal: 0, now: 0 };
let charts, topology, actions, events, requests;
let isDue = false;
let answered = true;
let lastExit = "";

function onFrame(frame) {
  const isFirst = Boolean(frame.about);
  if (isFirst) begin(frame.about);
  Object.assign(view, {
    service: frame.service,
    engines: frame.engines,
    silent: frame.silent,
    leases: frame.leases,
    leasesTotal: frame.leases_total,
    now: frame.now,
  });
  answered ||= ["answered_s", "failed_s"].some((name) => frame.samples[name]?.some((value) => value > 0));
  events.add(frame.events, isFirst);
  // The report of an exit comes a little later than its event.
  if (isFirst || (frame.last_exit ?? "") !== lastExit) askExits();
  lastExit = frame.last_exit ?? "";
  charts.add(frame.samples, frame.now, isFirst);
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(draw);
}

function begin(about) {
  view.about = about;
  answered = true;
  put(byId("version"), `${about.version} on ${about.machine}`);
  put(byId("mode"), about.write ? "may change" : "view only");
  putData(byId("mode"), "write", String(about.write));
}

function draw() {
  isDue = false;
  const { service } = view;
  document.title = `${service.state === "ready" ? "" : `${service.state}: `}${service.service} · pdctl`;
  put(byId("service"), service.service);
  put(byId("state"), service.state);
  putData(byId("state"), "tone", serviceTone(service.state));
  put(byId("model"), service.served_model_name || service.model);
  put(byId("url"), service.proxy_url);
  notice(service.failure ?? (service.apply?.state === "failed" ? `The last apply failed: ${service.apply.error}` : ""));
  vitals();
  topology.draw(view);
  drawLeases(view);
  actions.draw(view);
}

function notice(words) {
  put(byId("notice"), words);
  byId("notice").hidden = words === "";
}

function vital(id, tone, big, small) {
  const node = byId(id);
  putData(node, "tone", tone);
  put(node.children[1], big);
  put(node.children[2], small);
}

function vitals() {
  const { processes, links, attached } = view.service;
  const all = processes.length + attached.length;
  const silent = attached.filter((engine) => isSilent(engine, view.silent)).map((engine) => engine.name);
  const down = processes.filter((one) => one.state !== "ready");
  const ready = all - down.length - silent.length;
  const isBad = silent.length > 0 || down.some((one) => processTone(one) === "bad");
  const missing = [...down.map((one) => `${one.name} ${one.state}`), ...silent.map((name) => `${name} silent`)];
  vital(
    "vital-processes",
    isBad ? "bad" : missing.length ? "busy" : "good",
    `${ready} / ${all}`,
    missing.join(", ") || "all of them",
  );

  const broken = links.filter((link) => link.error).length;
  const slow = links.filter((link) => link.fallback).length;
  const moved = links.reduce((sum, link) => sum + link.bytes, 0);
  const trouble = [broken ? `${number(broken)} without a connection` : "", slow ? `${number(slow)} on a fallback` : ""]
    .filter(Boolean)
    .join(", ");
  vital(
    "vital-links",
    links.some((link) => linkTone(link) === "bad") ? "bad" : links.length ? "good" : "idle",
    number(links.length),
    trouble || `${bytes(moved)} moved`,
  );

  const leaks = view.leases.filter((lease) => lease.leak).length;
  const held = view.leases.reduce((sum, lease) => sum + lease.bytes, 0);
  vital(
    "vital-leases",
    leaks ? "bad" : "good",
    number(view.leasesTotal),
    leaks ? plural(leaks, "leak") : `${bytes(held)}, no leak`,
  );

  const restarts = processes.reduce((sum, one) => sum + one.restarts, 0);
  const last = processes
    .filter((one) => one.last_exit && !one.last_exit.expected)
    .sort((a, b) => (a.last_exit.at < b.last_exit.at ? 1 : -1))[0];
  const words = last
    ? `${last.name} ${last.last_exit.reason}, ${ago(view.now - Date.parse(last.last_exit.at) / 1000)}`
    : "none after a failure";
  const isRecent = last && view.now - Date.parse(last.last_exit.at) / 1000 < 900;
  vital("vital-restarts", isRecent ? "busy" : "idle", number(restarts), words);
}

async function askExits() {
  const found = await call("GET", "/api/exits").catch(() => null);
  if (found !== null) drawExits(found.exits);
}

/** Requests are asked for when some have ended and their table is on the screen. */
function watchRequests() {
  let isSeen = true;
  let isEmpty = true;
  new IntersectionObserver(([entry]) => {
    isSeen = entry.isIntersecting;
  }).observe(byId("requests"));
  setInterval(async () => {
    if (document.hidden || !(isSeen || isEmpty) || !answered || view.service === null) return;
    answered = false;
    const found = await call("GET", "/api/requests").catch(() => null);
    if (found === null) {
      answered = true;
      return;
    }
    isEmpty = found.requests.length === 0;
    requests.draw(found.requests);
  }, REQUESTS_MS);
}

/** The doctor runs when its findings come into sight for the first time, and when somebody wants it. */
function watchDoctor() {
  const look = async (method) => {
    const found = await call(method, "/api/doctor").catch(() => null);
    if (found === null) return;
    drawFindings(found, view.now);
    if (found.running) setTimeout(() => look("GET"), FINDINGS_MS);
  };
  byId("doctor-again").addEventListener("click", () => look("POST"));
  const seen = new IntersectionObserver(([entry]) => {
    if (!entry.isIntersecting || view.service === null) return;
    seen.disconnect();
    look("GET");
  });
  return () => seen.observe(byId("doctor"));
}

function followTheme() {
  const choice = byId("theme");
  const apply = () => {
    if (choice.value) document.documentElement.dataset.theme = choice.value;
    else delete document.documentElement.dataset.theme;
    charts?.repaint();
  };
  choice.value = localStorage.getItem(THEME) ?? "";
  choice.addEventListener("change", () => {
    localStorage.setItem(THEME, choice.value);
    apply();
  });
  apply();
}

function onLink(tone, words, reason = "") {
  put(byId("live"), words);
  putData(byId("live"), "tone", tone);
  byId("live").title = reason;
  document.body.classList.toggle("stale", tone !== "good");
  if (words === "refused") notice(reason);
}

takeToken();
addEventListener("hashchange", () => location.hash.length === 41 && location.reload());
followTheme();
charts = new Charts((seconds) => call("GET", `/api/history?span_s=${seconds}`).then((found) => found.samples));
actions = new Actions(call);
topology = new Topology((name) => actions.open(name));
events = new Events();
requests = new Requests();
watchRequests();
const observeDoctor = watchDoctor();
let hasBegun = false;
follow((frame) => {
  onFrame(frame);
  if (!hasBegun) observeDoctor();
  hasBegun = true;
}, onLink);
