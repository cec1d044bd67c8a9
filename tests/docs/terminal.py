"""A terminal's text over time, and an animated SVG of it that plays without scripts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple

LETTER, LINE, MARGIN = 7.4, 17, 14
# Text that comes this fast after one another appears at once.
_TOGETHER_S = 0.09
_END_S = 6.0
_ESCAPE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")
_STYLE = """\
text{font:12.3px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;fill:#d6dbe1;white-space:pre}
.prompt{fill:#7ee787}.command{fill:#ffffff;font-weight:600}.beside{fill:#ffa657;font-weight:600}.note{fill:#8b949e}
@media (prefers-reduced-motion:reduce){*{animation:none!important}}"""


@dataclass
class Span:
    """Text in one row that appears at `start`; one with an `end` is overwritten then. Seconds."""

    row: int
    column: int
    text: str
    start: float
    kind: str
    end: float | None = None


class Beside(NamedTuple):
    """A line typed in another terminal."""

    text: str
    start: float


@dataclass
class Recording:
    """What a terminal with so many columns shows, and when. Knows new lines, carriage returns and erased lines; colours
    are dropped."""

    columns: int
    spans: list[Span] = field(default_factory=list)
    besides: list[Beside] = field(default_factory=list)
    scrolls: list[tuple[float, int]] = field(default_factory=list)
    now: float = 0.0
    row: int = 0
    column: int = 0

    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds

    def beside(self, text: str) -> None:
        """Somebody types this in another terminal, now."""
        self.besides.append(Beside(text, self.now))

    def write(self, text: str, kind: str = "") -> None:
        """The program prints this, now."""
        at = 0
        for found in _ESCAPE.finditer(text):
            self._plain(text[at : found.start()], kind)
            at = found.end()
            if found[2] in "KJ":
                self._erase()
        self._plain(text[at:], kind)

    def _plain(self, text: str, kind: str) -> None:
        for part in re.split(r"(\n|\r)", text):
            if part == "\n":
                self._next_row()
            elif part == "\r":
                self.column = 0
            else:
                self._put(part, kind)

    def _put(self, text: str, kind: str) -> None:
        while text:
            if self.column >= self.columns:
                self._next_row()
            piece, text = text[: self.columns - self.column], text[self.columns - self.column :]
            self._overwrite()
            last = self.spans[-1] if self.spans else None
            is_same = last is not None and (last.row, last.kind, last.end) == (self.row, kind, None)
            if last and is_same and self.now - last.start < _TOGETHER_S and last.column + len(last.text) == self.column:
                last.text += piece
            else:
                self.spans.append(Span(self.row, self.column, piece, self.now, kind))
            self.column += len(piece)

    def _overwrite(self) -> None:
        """What is written over an older text ends it."""
        for span in self.spans:
            if span.row == self.row and span.end is None and span.column >= self.column:
                span.end = self.now

    def _erase(self) -> None:
        self._overwrite()

    def _next_row(self) -> None:
        self.row, self.column = self.row + 1, 0
        self.scrolls.append((self.now, self.row))


def drawn(recording: Recording, rows: int, note: str) -> str:
    """An SVG with so many rows, which plays the recording again and again. Without animation it shows the end."""
    length = recording.now + _END_S
    width, height = round(recording.columns * LETTER + 2 * MARGIN), (rows + 2) * LINE + 2 * MARGIN
    rules: dict[tuple[float, float | None], str] = {}
    lines = [_span(span, length, rules) for span in recording.spans if span.text.strip()]
    lines_beside = [_beside(line, rows, length, rules, height) for line in recording.besides]
    scroll, last = _scroll(recording, rows, length)
    style = "\n".join([_STYLE, *rules.values(), scroll])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="A recording of a terminal">\n<style>{style}</style>\n'
        f'<rect width="{width}" height="{height}" rx="10" fill="#0d1117" stroke="#30363d"/>\n'
        f'<clipPath id="view"><rect x="0" y="{MARGIN - 4}" width="{width}" height="{rows * LINE + 6}"/></clipPath>\n'
        f'<g clip-path="url(#view)"><g class="scroll" style="transform:translateY({-last * LINE}px)">\n'
        + "\n".join(lines)
        + f'\n</g></g>\n<path d="M0 {height - 2 * LINE - 4}H{width}" stroke="#30363d"/>\n'
        + "\n".join(lines_beside)
        + f'\n<text class="note" x="{width - MARGIN}" y="{height - LINE}" text-anchor="end">{escape(note)}</text>'
        + "\n</svg>\n"
    )


def _span(span: Span, length: float, rules: dict[tuple[float, float | None], str]) -> str:
    x, y = MARGIN + span.column * LETTER, MARGIN + (span.row + 0.75) * LINE
    words = " ".join(filter(None, [_animation(span.start, span.end, length, rules), span.kind]))
    hidden = ' opacity="0"' if span.end is not None else ""
    size = f' textLength="{len(span.text) * LETTER:.1f}"' if len(span.text) > 1 else ""
    return f'<text class="{words}" x="{x:.1f}" y="{y:.1f}"{size}{hidden}>{escape(span.text, quote=False)}</text>'


def _beside(
    line: Beside, rows: int, length: float, rules: dict[tuple[float, float | None], str], height: int
) -> str:
    name = _animation(line.start, None, length, rules)
    return (
        f'<g class="{name}"><text class="note" x="{MARGIN}" y="{height - LINE}">another terminal: </text>'
        f'<text class="beside" x="{MARGIN + 18 * LETTER:.1f}" y="{height - LINE}">{escape(line.text)}</text></g>'
    )


def _animation(start: float, end: float | None, length: float, rules: dict[tuple[float, float | None], str]) -> str:
    """The class of what appears and disappears at these times; makes its rule."""
    key = (round(start, 2), None if end is None else round(end, 2))
    if key not in rules:
        name = f"t{len(rules)}"
        gone = "" if end is None else f"{100 * end / length:.2f}%{{opacity:0}}"
        frames = f"@keyframes {name}{{0%{{opacity:0}}{100 * start / length:.2f}%{{opacity:1}}{gone}}}"
        rules[key] = f"{frames}.{name}{{animation:{name} {length:.1f}s step-end infinite}}"
    return rules[key].partition("{")[0].removeprefix("@keyframes ")


def _scroll(recording: Recording, rows: int, length: float) -> tuple[str, int]:
    """The rule that keeps the last rows in view, and how many rows are above them in the end."""
    steps = {round(100 * at / length, 2): max(0, row - rows + 1) for at, row in recording.scrolls}
    moves: list[str] = []
    last = -1
    for at, above in steps.items():
        if above != last:
            moves.append(f"{at:.2f}%{{transform:translateY({-above * LINE}px)}}")
            last = above
    frames = f"@keyframes scroll{{0%{{transform:none}}{''.join(moves)}}}"
    return f"{frames}.scroll{{animation:scroll {length:.1f}s step-end infinite}}", max(last, 0)
