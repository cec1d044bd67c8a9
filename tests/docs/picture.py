"""Draws docs/images/service-light.svg and service-dark.svg: a service as the README shows it. Run by `scripts/docs`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

IMAGES = Path(__file__).parents[2] / "docs" / "images"
WIDTH, HEIGHT = 860, 330


class Palette(NamedTuple):
    """Colours; each text has a contrast of at least 4.5 to what is behind it."""

    ground: str
    panel: str
    line: str
    text: str
    soft: str
    prefill: str
    decode: str
    proxy: str
    moves: str


PALETTES = {
    "light": Palette("#ffffff", "#f6f8fa", "#8c959f", "#1f2328", "#59636e", "#0969da", "#1a7f37", "#6639ba", "#bc4c00"),
    "dark": Palette("#0d1117", "#161b22", "#6e7681", "#e6edf3", "#9da7b3", "#58a6ff", "#3fb950", "#bc8cff", "#f0883e"),
}
_FONT = "system-ui, -apple-system, 'Segoe UI', sans-serif"


def drawn(colours: Palette) -> str:
    """The picture in these colours."""
    parts = [
        _box(150, 14, 696, 302, colours.panel, colours.line, dashed=True),
        _text(166, 40, "pdctl up: plans, pins, starts, watches, restarts", colours.soft, 14),
        *_client(colours),
        *_process(190, 118, "proxy", "OpenAI and Anthropic API", "keeps every stream going", colours.proxy, colours),
        *_process(
            580, 62, "prefill-0", "GPU 0: computes prompts", "holds KV under a lease", colours.prefill, colours
        ),
        *_process(580, 210, "decode-0", "GPU 1: generates tokens", "commits, then frees it", colours.decode, colours),
        _arrow("M96 150 H186", colours.text),
        _arrow("M186 174 H96", colours.text),
        _arrow("M412 144 C500 144 490 108 576 108", colours.prefill),
        _text(440, 100, "1 prompt", colours.prefill, 13),
        _arrow("M576 256 C490 256 500 174 412 174", colours.decode),
        _text(440, 246, "3 tokens", colours.decode, 13),
        _arrow("M690 154 V206", colours.moves, 4),
        _text(704, 177, "2 KV cache", colours.moves, 13),
        _text(704, 195, "GPU, RDMA or shm", colours.moves, 13),
        _text(190, 256, "An engine dies:", colours.text, 14, bold=True),
        _text(190, 277, "its KV leases end, it restarts, and its", colours.soft, 14),
        _text(190, 297, "streams go on with the next token.", colours.soft, 14),
    ]
    about = "Clients send prompts to the proxy; prefill computes them, KV moves to decode, tokens stream back."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{about}" font-family="{_FONT}">\n<title>{about}</title>\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="12" fill="{colours.ground}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _client(colours: Palette) -> list[str]:
    return [
        _box(14, 118, 80, 88, colours.panel, colours.line),
        _text(54, 158, "clients", colours.text, 15, middle=True, bold=True),
        _text(54, 180, "any number", colours.soft, 12, middle=True),
    ]


def _process(x: int, y: int, name: str, what: str, also: str, colour: str, colours: Palette) -> list[str]:
    """A box of a process: its name, what it does, and what it takes care of."""
    return [
        _box(x, y, 220, 88, colours.ground, colour),
        f'<rect x="{x}" y="{y}" width="6" height="88" rx="3" fill="{colour}"/>',
        _text(x + 20, y + 28, name, colours.text, 16, bold=True),
        _text(x + 20, y + 51, what, colours.soft, 13),
        _text(x + 20, y + 71, also, colours.soft, 13),
    ]


def _box(x: int, y: int, width: int, height: int, fill: str, line: str, *, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="6 5"' if dashed else ""
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" stroke="{line}" '
        f'stroke-width="1.5"{dash}/>'
    )


def _text(x: int, y: int, words: str, fill: str, size: int, *, middle: bool = False, bold: bool = False) -> str:
    more = (' text-anchor="middle"' if middle else "") + (' font-weight="600"' if bold else "")
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}"{more}>{words}</text>'


def _arrow(path: str, colour: str, width: int = 2) -> str:
    """A line with a head, which an SVG marker of the line's own colour draws."""
    name = f"head-{colour.lstrip('#')}-{width}"
    marker = (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="{10 / width:g}" '
        f'markerHeight="{10 / width:g}" orient="auto"><path d="M0 0 L8 4 L0 8 Z" fill="{colour}"/></marker>'
    )
    return (
        f'<defs>{marker}</defs><path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}" '
        f'marker-end="url(#{name})"/>'
    )


def write() -> None:
    """Write both pictures again."""
    for name, colours in PALETTES.items():
        (IMAGES / f"service-{name}.svg").write_text(drawn(colours), encoding="utf-8")


if __name__ == "__main__":
    write()
