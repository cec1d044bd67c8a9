// What the state of a process, a link or an event means to a reader: a tone, which has a colour and a sign of its own.

import { NOTHING } from "./text.js";

const ENGINE_ROLES = ["prefill", "hybrid", "decode"];
const BUSY = ["starting", "draining", "drained", "pending", "clearing", "stopping"];
const COMES_BACK = ["pending", "starting", "clearing", "backoff"];
const SERVICE = { ready: "good", starting: "busy", degraded: "bad", failed: "bad", stopping: "idle" };
const BAD_EVENTS = ["failed", "not_alive", "apply_failed", "node_lost", "no_log"];
const CAREFUL_EVENTS = [
  "blocked",
  "drain_over",
  "role_drain_over",
  "node_silent",
  "shared_memory",
  "run_dir_restored",
  "restarted_with",
];
const GOOD_EVENTS = ["ready", "service_ready", "role_done", "drained", "node_answers", "adopted"];
const TROUBLE = /FALLBACK|no link to|cannot be|did not accept/;

export const isEngine = (process) => ENGINE_ROLES.includes(process.role);
export const serviceTone = (state) => SERVICE[state] ?? "idle";

/** Whether a process is gone although nobody wanted that, and is not back yet. */
function isMissed(process) {
  if (process.state === "failed") return true;
  return COMES_BACK.includes(process.state) && process.last_exit !== null && !process.last_exit.expected;
}

/** good, busy (it changes, as somebody wanted), bad, or idle. */
export function processTone(process) {
  if (isMissed(process)) return "bad";
  if (process.state === "ready") return process.leaving_role ? "busy" : "good";
  if (process.state === "backoff" || BUSY.includes(process.state)) return "busy";
  return "idle";
}

/** The state of a process as a few words. */
export function processWords(process) {
  const parts = [process.state];
  if (isMissed(process) && process.last_exit) parts.unshift(process.last_exit.reason);
  if (process.phase && process.state === "starting") parts.push(process.phase);
  if (process.reason && process.state !== "failed") parts.push(process.reason);
  if (process.leaving_role) parts.push(`still ends its ${process.leaving_role} work`);
  return parts.join(" · ");
}

/** Whether an engine that pdctl does not start fails to answer. */
export const isSilent = (engine, silent) => engine.name in silent || engine.answers === false;

export function attachedTone(engine, silent) {
  if (isSilent(engine, silent)) return "bad";
  if (engine.answers === null) return "idle";
  return engine.leaving ? "busy" : "good";
}

export function attachedWords(engine, silent) {
  if (isSilent(engine, silent))
    return silent[engine.name] ? `does not answer: ${silent[engine.name]}` : "does not answer";
  if (engine.leaving) return "leaving";
  return engine.registered ? "registered itself" : "attached";
}

/** good, bad (no link, or a fallback), or idle (not yet). */
export function linkTone(link) {
  if (link.error || link.fallback) return "bad";
  return link.transport ? "good" : "idle";
}

export function linkName(link) {
  if (!link.transport) return link.error ? "no link" : NOTHING;
  return link.protocol && link.protocol !== link.transport ? `${link.transport} over ${link.protocol}` : link.transport;
}

export function linkWhy(link) {
  if (link.error) return link.error;
  return link.fallback ? `fallback: ${link.fallback}` : link.reason;
}

export function eventTone(event) {
  if (event.event === "exited") return event.expected ? "idle" : "bad";
  if (BAD_EVENTS.includes(event.event)) return "bad";
  if (CAREFUL_EVENTS.includes(event.event) || TROUBLE.test(event.message)) return "busy";
  return GOOD_EVENTS.includes(event.event) ? "good" : "idle";
}
