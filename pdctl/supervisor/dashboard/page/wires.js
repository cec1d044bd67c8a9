// The lines between the cards of engines: KV moves along them, from prefill to the engine that reads.

import { linkName, linkTone } from "./states.js";
import { h, keyed, NOTHING, put, putAttribute, putData, withUnit } from "./text.js";

const SVG = "http://www.w3.org/2000/svg";
// With more links than this, only those with trouble have their name beside them.
const MOST_NAMED = 9;
// Where a name is on its line: near the engine that KV comes from, whose lines have not crossed others there.
const NAME_AT = 0.34;
// Between a name and the card beside it, and from one name to the next below it, pixels.
const [ASIDE, BELOW] = [8, 26];

/** Draw all links between the cards of a picture, as they are laid out now. */
export function drawWires(picture, links) {
  const svg = picture.querySelector(".wires");
  const box = picture.getBoundingClientRect();
  const places = new Map(
    [...picture.querySelectorAll(".card.engine")].map((card) => [card.dataset.name, place(card, box)]),
  );
  const wires = links
    .filter((link) => places.has(link.peer) && places.has(link.reader))
    .map((link) => ({
      key: `${link.peer}>${link.reader}`,
      link,
      tone: linkTone(link),
      curve: curve(places.get(link.peer), places.get(link.reader)),
    }));
  putAttribute(svg, "viewBox", `0 0 ${box.width} ${box.height}`);
  keyed(
    svg,
    wires,
    (wire) => wire.key,
    () => document.createElementNS(SVG, "path"),
    (path, wire) => {
      putData(path, "tone", wire.tone);
      putAttribute(path, "d", path2d(wire.curve));
    },
  );
  const named = wires.filter((wire) => wires.length <= MOST_NAMED || wire.tone === "bad").slice(0, MOST_NAMED);
  const names = picture.querySelector(".wire-labels");
  keyed(
    names,
    named,
    (wire) => wire.key,
    () => h("span", {}, h("i", { class: "sign" }), h("b")),
    drawName,
  );
  placeNames(names, named);
}

function drawName(label, { link, tone }) {
  putData(label, "tone", tone);
  const fast = link.gbps > 0 ? ` ${withUnit(link.gbps, "GB/s")}` : "";
  const name = link.fallback ? `${linkName(link)}, fallback` : linkName(link);
  put(label.lastChild, name === NOTHING ? "no link yet" : `${name}${fast}`);
}

/** Each name on its line, beside the card and not on another name. */
function placeNames(names, wires) {
  const placed = wires.map(({ curve: [from, first, second, to] }, number) => {
    const [x, y] = [0, 1].map((axis) => at(NAME_AT, from[axis], first[axis], second[axis], to[axis]));
    const half = names.children[number].offsetWidth / 2;
    const [low, high] =
      from[0] < to[0] ? [from[0] + half + ASIDE, to[0] - half - ASIDE] : [from[0] + half + ASIDE, Infinity];
    return { label: names.children[number], x: Math.max(low, Math.min(high, x)), y };
  });
  let free = -Infinity;
  for (const { label, x, y } of placed.sort((a, b) => a.y - b.y)) {
    const down = Math.max(y, free);
    free = down + BELOW;
    label.style.translate = `calc(${x.toFixed(1)}px - 50%) calc(${down.toFixed(1)}px - 50%)`;
  }
}

function place(card, box) {
  const found = card.getBoundingClientRect();
  return { left: found.left - box.left, right: found.right - box.left, y: (found.top + found.bottom) / 2 - box.top };
}

/** A cubic curve between two cards: it leaves and arrives horizontally, and bends to the side within one column. */
function curve(from, to) {
  if (Math.abs(from.left - to.left) < 20) {
    const out = Math.max(from.right, to.right) + 70;
    return [
      [from.right, from.y],
      [out, from.y],
      [out, to.y],
      [to.right, to.y],
    ];
  }
  const forward = from.left < to.left;
  const [begin, end] = forward ? [from.right, to.left] : [from.left, to.right];
  const middle = (begin + end) / 2;
  return [
    [begin, from.y],
    [middle, from.y],
    [middle, to.y],
    [end, to.y],
  ];
}

function path2d([from, first, second, to]) {
  const [a, b, c, d] = [from, first, second, to].map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`);
  return `M${a}C${b} ${c} ${d}`;
}

function at(t, a, b, c, d) {
  const s = 1 - t;
  return s * s * s * a + 3 * s * s * t * b + 3 * s * t * t * c + t * t * t * d;
}
