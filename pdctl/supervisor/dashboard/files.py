"""The files of the page. A browser loads nothing from anywhere else."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from starlette.responses import Response

# With every answer: only our own files run, nobody frames the page or keeps what it was told.
SAFETY = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
_HTML, _CSS, _JS, _SVG = "text/html", "text/css", "text/javascript", "image/svg+xml"
_FILES = {
    "/": ("index.html", _HTML),
    "/dash.css": ("dash.css", _CSS),
    "/icon.svg": ("icon.svg", _SVG),
    "/uplot/uPlot.iife.min.js": ("uplot/uPlot.iife.min.js", _JS),
    "/uplot/uPlot.min.css": ("uplot/uPlot.min.css", _CSS),
    "/uplot/LICENSE": ("uplot/LICENSE", "text/plain"),
} | {
    f"/{name}.js": (f"{name}.js", _JS)
    for name in (
        "dash", "actions", "charts", "lists", "requests", "samples", "server", "states", "text", "topology", "wires",
    )
}  # fmt: skip


def file_answer(method: str, path: str) -> Response:
    """A file of the page."""
    if path not in _FILES:
        return Response(f"There is no page {path}.", 404, SAFETY, "text/plain")
    if method not in ("GET", "HEAD"):
        return Response("The page is read with GET.", 405, {**SAFETY, "allow": "GET"}, "text/plain")
    name, kind = _FILES[path]
    return Response(_content(name), 200, SAFETY, kind)


@cache
def _content(name: str) -> bytes:
    return files("pdctl.supervisor.dashboard").joinpath("page", name).read_bytes()
