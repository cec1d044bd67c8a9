"""Report pages in Chromium: plots are drawn, nothing is fetched, there are no errors, and they fit on a phone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdctl.bench.measurements import Measurements
from pdctl.bench.report.observations import Curves
from pdctl.bench.report.page import comparison, curves, page
from pdctl.bench.report.style import DARK, LIGHT
from tests.bench.test_report import result
from tests.chromium import BINARY, Browser, browser

pytestmark = pytest.mark.skipif(BINARY is None, reason="NOT TESTED: no chromium")


@pytest.fixture
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


def watched(gap: float) -> Measurements:
    """A result with engine samples, one engine missing for a while."""
    found, rng = result(gap), random.Random(3)
    engines = {
        name: {
            "running": [None if 20 < at < 30 and name == "decode-1" else float(rng.randint(0, 8)) for at in range(60)],
            "waiting": [0.0] * 60, "kv_used": [rng.random() for _ in range(60)], "leases": [1.0] * 60,
            "tokens_per_s": [20.0] * 60,
        }
        for name in ("prefill-0", "prefill-1", "decode-0", "decode-1")
    }  # fmt: skip
    ours = found["pdctl"]
    assert isinstance(ours, dict)
    ours["placed"] = [[f"prefill-{n % 2}", f"decode-{n % 3 % 2}", 0.01] for n in range(60)]
    ours["engines"] = {"at": [float(at) for at in range(60)], "engines": engines}
    return found


RATIOS = [["TTFT p50", "1", "2", "0.500", "0.4 to 0.6", "first is lower: better"]]
PAGES: dict[str, tuple[Callable[[], str], int]] = {
    "one result": (lambda: page(watched(0.02), "pdctl bench serve", (50, 90, 99), "interrupted: 3 of 9"), 8),
    "two results": (
        lambda: comparison({"pd": result(0.02), "colocated": result(0.03)}, {"colocated": RATIOS}, "a against b"),
        3,
    ),
    "four results": (
        lambda: comparison({f"run-{n}": result(0.01 * n) for n in range(1, 5)},
                           {f"run-{n}": RATIOS for n in range(2, 5)}, "four"),
        3,
    ),
    "curves": (
        lambda: curves([Curves("GB/s", "blocks", {"shm": [(1, 4.0), (4096, 3.0)], "copy": [(1, 5.0), (16384, 1.0)]})],
                       "pdctl bench transfer", "Medians.", (["TRANSPORT", "MIB"], [["shm", "1"]])),
        1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [1600, 1200, 390])
def test_a_page(chromium: Browser, tmp_path: Path, name: str, width: int) -> None:
    made, plots = PAGES[name]
    path = tmp_path / "page.html"
    path.write_text(made())
    chromium.open(path, width)
    assert [address for address in chromium.fetched if not address.startswith("data:")] == [path.as_uri()]
    assert chromium.complaints == []
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width, "nothing hangs over"
    drawn = chromium.evaluate("""[...document.querySelectorAll('.frame')].map(frame => ({
        left: frame.closest('section').getBoundingClientRect().left,
        wide: frame.getBoundingClientRect().width, high: frame.getBoundingClientRect().height,
        ink: [...frame.querySelectorAll('polyline, rect')].filter(
            e => e.getBBox().width + e.getBBox().height > 1).length,
        out: [...frame.querySelectorAll('polyline, rect, .dot')].filter(e => {
            const r = e.getBoundingClientRect(), s = frame.getBoundingClientRect();
            return r.left < s.left - 6 || r.right > s.right + 6 || r.top < s.top - 6 || r.bottom > s.bottom + 6;
        }).length,
        ticks: ['.x', '.y'].map(kind => {
            const boxes = [...frame.querySelectorAll(kind)].map(e => e.getBoundingClientRect()).filter(r => r.width);
            const touching = boxes.filter((a, n) => boxes.some((b, m) => m > n && a.left < b.right && b.left < a.right
                && a.top < b.bottom - 1 && b.top < a.bottom - 1));
            return [boxes.length, touching.length];
        }),
        text: Math.min(...[...frame.querySelectorAll('.x, .y, .m, .xt')].filter(e => e.offsetWidth).map(
            e => parseFloat(getComputedStyle(e).fontSize))),
        title: frame.getAttribute('aria-label'),
    }))""")
    assert len(drawn) == plots
    for plot in drawn:
        assert plot["wide"] > 0.6 * min(width, 600)
        assert plot["high"] > 100
        assert plot["ink"] > 0
        assert plot["out"] == 0, "all of it lies within its frame"
        assert plot["text"] >= 12, "pixels: a person can read it"
        assert plot["ticks"][0][0] >= 2, "the x axis has ticks"
        assert plot["ticks"][0][1] == plot["ticks"][1][1] == 0, "which do not touch"
        assert len(plot["title"]) > 2
    columns = len({round(plot["left"]) for plot in drawn})
    assert columns == (1 if width < 1024 or plots == 1 else 2)
    assert chromium.evaluate("Math.min(...[...document.querySelectorAll('td')].map("
                             "e => parseFloat(getComputedStyle(e).fontSize)))") >= 12  # fmt: skip
    assert chromium.picture().startswith(b"\x89PNG")


_CONTRASTS = """(() => {
    const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
    const light = c => { const [r, g, b] = c.map(v => v / 255).map(
        v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const below = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
        if (c.length === 3 || c[3] === 1) return c.slice(0, 3); } return [255, 255, 255]; };
    const ratio = (a, b) => {
        const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
    return [...document.querySelectorAll('body *')].filter(e => e.offsetWidth &&
        [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(
        e => [ratio(rgb(getComputedStyle(e).color).slice(0, 3), below(e)), e.textContent.slice(0, 40)]);
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(chromium: Browser, tmp_path: Path, scheme: str) -> None:
    """WCAG AA for each text as the browser paints it, in both schemes."""
    path = tmp_path / "page.html"
    grounds = set()
    for made, _ in PAGES.values():
        path.write_text(made())
        chromium.open(path, 1200, dark=scheme == "dark")
        found = chromium.evaluate(_CONTRASTS)
        assert len(found) > 15
        assert [(ratio, text) for ratio, text in found if ratio < 4.5] == []
        grounds.add(chromium.evaluate("getComputedStyle(document.body).backgroundColor"))
    colour = {"light": LIGHT, "dark": DARK}[scheme]["page"]
    assert grounds == {f"rgb({', '.join(str(int(colour[n : n + 2], 16)) for n in (1, 3, 5))})"}
