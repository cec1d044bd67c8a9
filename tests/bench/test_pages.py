"""Report pages in Chromium: plots are drawn, nothing is fetched, there are no errors, and they fit on a phone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdctl.bench.measurements import Measurements
from pdctl.bench.report.observations import Curves
from pdctl.bench.report.page import comparison, curves, page
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


PAGES: dict[str, tuple[Callable[[], str], int]] = {
    "one result": (lambda: page(watched(0.02), "pdctl bench serve", (50, 90, 99), "interrupted: 3 of 9"), 8),
    "two results": (
        lambda: comparison({"pd": result(0.02), "colocated": result(0.03)},
                           [["TTFT p50", "1", "2", "0.500", "0.4 to 0.6", "first is lower: better"]], "a against b"),
        3,
    ),
    "curves": (
        lambda: curves([Curves("GB/s", "blocks", {"shm": [(1, 4.0), (4096, 3.0)], "copy": [(1, 5.0), (16384, 1.0)]})],
                       "pdctl bench transfer", "Medians.", (["TRANSPORT", "MIB"], [["shm", "1"]])),
        1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [1200, 390])
def test_a_page(chromium: Browser, tmp_path: Path, name: str, width: int) -> None:
    made, plots = PAGES[name]
    path = tmp_path / "page.html"
    path.write_text(made())
    chromium.open(path, width)
    assert [address for address in chromium.fetched if not address.startswith("data:")] == [path.as_uri()]
    assert chromium.complaints == []
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width, "nothing hangs over"
    drawn = chromium.evaluate("""[...document.querySelectorAll('svg')].map(svg => ({
        wide: svg.getBoundingClientRect().width, high: svg.getBoundingClientRect().height,
        ink: [...svg.querySelectorAll('polyline, rect')].filter(e => e.getBBox().width + e.getBBox().height > 1).length,
        out: [...svg.querySelectorAll('polyline, rect, circle, text')].filter(e => {
            const r = e.getBoundingClientRect(), s = svg.getBoundingClientRect();
            return r.left < s.left - 1 || r.right > s.right + 1 || r.top < s.top - 1 || r.bottom > s.bottom + 1;
        }).length,
        text: Math.min(...[...svg.querySelectorAll('text')].filter(e => e.textContent).map(
            e => parseFloat(getComputedStyle(e).fontSize) * svg.getBoundingClientRect().width / 640)),
    }))""")
    assert len(drawn) == plots
    for plot in drawn:
        assert plot["wide"] > 0.8 * min(width, 700)
        assert plot["high"] > 100
        assert plot["ink"] > 0
        assert plot["out"] == 0, "all of it lies within its frame"
        assert plot["text"] >= 10, "pixels: a person can read it"
    assert chromium.evaluate("Math.min(...[...document.querySelectorAll('td')].map("
                             "e => parseFloat(getComputedStyle(e).fontSize)))") >= 12  # fmt: skip
    assert chromium.picture().startswith(b"\x89PNG")
