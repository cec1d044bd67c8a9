// Numbers, times and sizes as text, and the few helpers with which all parts build the page.

// A narrow space that does not break, between a number and its unit.
const GAP = "\u202f";
export const NOTHING = "–";

const isKnown = (value) => value !== null && value !== undefined && !Number.isNaN(value);

function digitsOf(value) {
  const size = Math.abs(value);
  return size === 0 || size >= 100 ? 0 : size >= 10 ? 1 : 2;
}

function fixed(value, digits) {
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** A count, or a number of three digits. */
export function number(value) {
  if (!isKnown(value)) return NOTHING;
  return fixed(value, Number.isInteger(value) ? 0 : digitsOf(value));
}

/** A measured value: always three digits, so that it does not change its width with every update. */
export function withUnit(value, unit) {
  return isKnown(value) ? `${fixed(value, digitsOf(value))}${GAP}${unit}` : NOTHING;
}

/** A round value, for an axis. */
export function roundWithUnit(value, unit) {
  return isKnown(value)
    ? `${value.toLocaleString("en", { maximumFractionDigits: 3 })}${unit ? GAP : ""}${unit}`
    : NOTHING;
}

/** Thousands as k, for an axis. */
export function short(value) {
  return value >= 1000 ? roundWithUnit(value / 1000, "k") : roundWithUnit(value, "");
}

export function roundDuration(seconds) {
  return seconds < 1 ? roundWithUnit(seconds * 1000, "ms") : roundWithUnit(seconds, "s");
}

/** Seconds as ms, s, or larger units. */
export function duration(seconds) {
  if (!isKnown(seconds)) return NOTHING;
  if (seconds < 1) return withUnit(seconds * 1000, "ms");
  if (seconds < 60) return withUnit(seconds, "s");
  const units = [
    ["d", 86400],
    ["h", 3600],
    ["m", 60],
    ["s", 1],
  ];
  const first = units.findIndex(([, size]) => seconds >= size);
  const [[large, by], [small, rest]] = [units[first], units[first + 1]];
  return `${Math.floor(seconds / by)}${GAP}${large} ${Math.floor((seconds % by) / rest)}${GAP}${small}`;
}

/** How long ago, in its largest unit. */
export function ago(seconds) {
  if (seconds < 1) return "just now";
  for (const [unit, size] of [
    ["d", 86400],
    ["h", 3600],
    ["m", 60],
    ["s", 1],
  ]) {
    if (seconds >= size) return `${Math.floor(seconds / size)}${GAP}${unit} ago`;
  }
  return "just now";
}

export function bytes(value) {
  if (!isKnown(value)) return NOTHING;
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  let left = value;
  while (left >= 1000 && at < units.length - 1) [left, at] = [left / 1000, at + 1];
  return at === 0 ? `${number(left)}${GAP}B` : withUnit(left, units[at]);
}

export function percent(part) {
  return !isKnown(part) ? NOTHING : `${Math.round(part * 100)}${GAP}%`;
}

/** Hours, minutes and seconds of a time in seconds since 1970. */
export function clock(at, withSeconds = true) {
  const time = new Date(at * 1000);
  const parts = [time.getHours(), time.getMinutes(), ...(withSeconds ? [time.getSeconds()] : [])];
  return parts.map((part) => String(part).padStart(2, "0")).join(":");
}

export function plural(count, one, many = `${one}s`) {
  return `${number(count)} ${count === 1 ? one : many}`;
}

/** Numbers such as 0, 1, 2, 5 as 0–2, 5. */
export function ranges(numbers) {
  const found = [];
  for (const one of [...numbers].sort((a, b) => a - b)) {
    const last = found.at(-1);
    if (last && last[1] === one - 1) last[1] = one;
    else found.push([one, one]);
  }
  return found.map(([from, to]) => (from === to ? `${from}` : `${from}–${to}`)).join(", ");
}

export const byId = (id) => document.getElementById(id);

/** An element. Properties: `class`, `data`, `on` (listeners), else attributes. */
export function h(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "data") Object.assign(node.dataset, value);
    else if (name === "on") for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
    else if (value !== null && value !== undefined && value !== false)
      node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Write text only where it has changed: what a reader has selected stays selected. */
export function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function putData(node, name, value) {
  if (node.dataset[name] !== value) node.dataset[name] = value;
}

export function putAttribute(node, name, value) {
  if (value === null) node.removeAttribute(name);
  else if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

/** Make the children of a node those of `items`, in order. Nodes stay as long as their items do. */
export function keyed(parent, items, keyOf, make, update) {
  const known = (parent.knownNodes ??= new Map());
  const keys = new Set();
  let before = null;
  for (const item of items) {
    const key = keyOf(item);
    keys.add(key);
    let node = known.get(key);
    if (!node) known.set(key, (node = make(item)));
    update?.(node, item);
    const next = before ? before.nextSibling : parent.firstChild;
    if (next !== node) parent.insertBefore(node, next);
    before = node;
  }
  for (const [key, node] of known) {
    if (keys.has(key)) continue;
    node.remove();
    known.delete(key);
  }
}
