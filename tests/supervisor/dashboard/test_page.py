"""The page in Chromium, with the stage behind it: what it draws, and for keyboards, phones, light and dark."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.chromium import BINARY, Browser, browser
from tests.supervisor.dashboard.served import Served, served
from tests.supervisor.dashboard.stage import KILLED

pytestmark = pytest.mark.skipif(BINARY is None, reason="NOT TESTED: no chromium")

AXE = os.environ.get("PDCTL_AXE")
DRAWN = "document.querySelectorAll('.card').length && document.querySelectorAll('#request-table tbody tr').length"


@pytest.fixture(scope="module")
def ours() -> Iterator[Served]:
    with served() as found:
        yield found


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture
def opened(ours: Served, chromium: Browser) -> Browser:
    show(chromium, ours.link())
    return chromium


def show(chromium: Browser, link: str, width: int = 1440, dark: bool = False) -> None:
    chromium.open("about:blank", width)
    chromium.open(link, width, dark=dark)
    chromium.until(DRAWN)


def texts(chromium: Browser, selector: str) -> list[str]:
    found = chromium.evaluate(f"JSON.stringify([...document.querySelectorAll({selector!r})].map(n => n.textContent))")
    return list(json.loads(found))


def tone(name: str) -> str:
    return f"document.querySelector('[data-name={name}]').dataset.tone"


def test_nothing_is_loaded_from_elsewhere_and_nothing_is_wrong(ours: Served, opened: Browser) -> None:
    assert opened.complaints == []
    assert all(url.startswith(f"{ours.url}/") for url in opened.fetched)
    assert not [url for url in opened.fetched if ours.read in url]


def test_the_token_leaves_the_address(ours: Served, opened: Browser) -> None:
    assert opened.evaluate("location.href") == f"{ours.url}/"
    # The old page is there until the new one begins.
    opened.evaluate("window.isOld = true; location.reload()")
    opened.until(f"!window.isOld && document.readyState === 'complete' && {DRAWN}")


def test_a_link_without_a_token_says_what_to_do(ours: Served) -> None:
    with browser() as other:
        other.open(f"{ours.url}/", 1000)
        assert "pdctl dash" in other.until("document.querySelector('#notice:not([hidden])')?.textContent")


def test_the_picture(opened: Browser) -> None:
    names = texts(opened, ".card-name")
    assert names == ["proxy", "prefill-0", "prefill-1", "decode-0", "decode-1", "far"]
    assert texts(opened, ".host-head h3")[1] == "10.20.0.7"
    assert "4 \u00d7 NVIDIA H200" in texts(opened, ".host-head .devices")[0]
    assert "GPU 2 · NVIDIA H200" in texts(opened, ".device .chip")
    labels = texts(opened, ".wire-labels span")
    assert len(labels) == len(texts(opened, ".wires path")) == 6
    assert "cuda_ipc 176\u202fGB/s" in labels
    assert "nixl over tcp, fallback 2.10\u202fGB/s" in labels


def test_a_fallback_is_red_and_says_so(opened: Browser) -> None:
    strokes = opened.evaluate(
        "JSON.stringify([...document.querySelectorAll('.wires path')].map(n => "
        "[n.dataset.tone, getComputedStyle(n).stroke, getComputedStyle(n).strokeDasharray]))"
    )
    found = json.loads(strokes)
    assert [one[0] for one in found] == ["good"] * 4 + ["bad"] * 2
    assert found[0][1] != found[4][1]
    assert found[0][2] == "none" != found[4][2]
    assert "fallback: mlx5_0 port 1 is down" in texts(opened, "#links .why")


def test_a_killed_engine_is_red_and_green_again(ours: Served, opened: Browser) -> None:
    """The process dies, and is started again; the page follows each event."""
    assert opened.evaluate(tone("decode-0")) == "good"
    before = {"state": "ready", "last_exit": None}
    ours.stage.change("decode-0", state="starting", last_exit=KILLED)
    ours.stage.exit("decode-0")
    opened.until(f"{tone('decode-0')} === 'bad'", 2.0)
    assert "killed by SIGKILL" in texts(opened, "[data-name=decode-0] .card-state")[0]
    assert texts(opened, "#vital-processes .big") == ["5 / 6"]
    assert "decode-0" in opened.until("document.querySelector('#exit-list b')?.textContent")
    ours.stage.change("decode-0", **before)
    ours.stage.journal.say("decode-0", "ready", "ready")
    opened.until(f"{tone('decode-0')} === 'good'", 2.0)


def test_an_attached_engine_that_does_not_answer_is_red(ours: Served, opened: Browser) -> None:
    assert opened.evaluate(tone("far")) == "good"
    before = list(ours.stage.attached)
    ours.stage.attached[0] = msgspec.structs.replace(before[0], answers=False)
    opened.until(f"{tone('far')} === 'bad'")
    assert texts(opened, "[data-name=far] .card-state") == ["does not answer"]
    assert texts(opened, "#vital-processes .small") == ["far silent"]
    ours.stage.attached[:] = before
    opened.until(f"{tone('far')} === 'good'")


def test_charts_have_lines_and_values(opened: Browser) -> None:
    assert len(texts(opened, ".chart canvas")) == 6
    for value in texts(opened, ".chart .legend b"):
        assert value != "\u2013"
    assert "95th percentile" in opened.evaluate("document.querySelector('#chart-ttft .canvas').ariaLabel")


def test_the_arrow_keys_move_the_cursor_of_all_charts(opened: Browser) -> None:
    opened.evaluate("document.querySelector('#chart-itl .canvas').focus()")
    opened.press("ArrowLeft")
    assert opened.until("document.querySelector('#charts-at').textContent").startswith("at ")
    opened.press("Escape")
    opened.until("document.querySelector('#charts-at').textContent === 'now'")


def test_a_longer_time(opened: Browser) -> None:
    opened.evaluate("document.querySelector('[data-seconds=\"3600\"]').click()")
    opened.until("document.querySelector('#span-name').textContent === 'hour'")
    opened.until("document.querySelector('#chart-ttft .legend b').textContent !== '\\u2013'")


def test_the_timeline_of_a_failover(opened: Browser) -> None:
    opened.evaluate("document.querySelector('tr[data-tone=busy] button').click()")
    assert texts(opened, ".lane:not(.scale) .lane-name") == ["proxy", "prefill-0", "decode-1", "decode-0"]
    names = texts(opened, ".phases li")
    assert [name.rstrip("0123456789.\u202fms ") for name in names] == [
        "queue", "prefill", "hand-over", "admission", "first step", "decode", "failed try", "first token",
    ]  # fmt: skip
    (note,) = texts(opened, ".notes li")
    assert note == "decode-1 failed after 900\u202fms and 31 tokens: connection lost. The request went on elsewhere."


def test_leases_exits_and_findings(opened: Browser) -> None:
    assert "leak: its holder decode-1@7f3a-1 is gone" in texts(opened, "#lease-list .sub")
    assert "killed by SIGKILL" in texts(opened, "#exit-list .grow")
    opened.evaluate("document.querySelector('#doctor').scrollIntoView()")
    opened.until("document.querySelectorAll('#finding-list li').length", 120)


def test_a_link_that_only_shows_has_no_buttons(opened: Browser) -> None:
    opened.evaluate("document.querySelector('[data-name=decode-0] .card-name').click()")
    assert opened.until("document.querySelector('#details').open")
    assert texts(opened, "#details-actions button") == []
    assert "pdctl dash --write" in texts(opened, "#details-actions")[0]
    opened.press("Escape")
    opened.until("!document.querySelector('#details').open")


def test_a_change_needs_a_confirmation_and_no_mouse(ours: Served, chromium: Browser) -> None:
    show(chromium, ours.link(write=True))
    chromium.evaluate("document.querySelector('[data-name=decode-1] .card-name').focus()")
    chromium.press("Enter")
    chromium.until("document.querySelector('#details').open")
    assert texts(chromium, "#details-actions button") == ["Restart", "Drain", "Stop", "Start", "Change role"]
    chromium.press("Tab")
    chromium.press("Enter")
    # The button that has the focus now cancels.
    assert texts(chromium, "#details-actions button") == ["Restart", "Cancel"]
    chromium.press("Enter")
    assert len(texts(chromium, "#details-actions button")) == 5
    assert ours.stage.asked == []
    chromium.press("Enter")
    chromium.evaluate("document.querySelector('#details-actions .strong').click()")
    chromium.until("document.querySelector('#told').dataset.shown === 'true'")
    assert ours.stage.asked == [("decode-1", "restart", "drain")]
    ours.stage.asked.clear()


def test_a_role_is_changed(ours: Served, chromium: Browser) -> None:
    show(chromium, ours.link(write=True))
    chromium.evaluate("document.querySelector('[data-name=prefill-1] .card-name').click()")
    chromium.evaluate("document.querySelector('#details-actions').querySelectorAll('button')[4].click()")
    assert texts(chromium, "#details-actions option") == ["decode", "hybrid"]
    chromium.evaluate("document.querySelector('#details-actions .strong').click()")
    chromium.until("document.querySelector('#told').dataset.shown === 'true'")
    assert ours.stage.asked == [("prefill-1", "role", "decode")]
    ours.stage.asked.clear()


@pytest.mark.parametrize("width", [1440, 1024, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_and_nothing_jumps(ours: Served, chromium: Browser, width: int, dark: bool) -> None:
    show(chromium, ours.link(), width, dark)
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    # Layout shifts of a loaded page, as browsers count them: https://web.dev/articles/cls
    chromium.evaluate(
        "new PerformanceObserver(list => { window.shifts = (window.shifts ?? 0) + "
        "list.getEntries().reduce((sum, one) => sum + one.value, 0) }).observe({type: 'layout-shift', buffered: false})"
    )
    ours.stage.change("decode-0", state="starting", last_exit=KILLED)
    ours.stage.exit("decode-0")
    chromium.until(f"{tone('decode-0')} === 'bad'")
    ours.stage.change("decode-0", state="ready", last_exit=None)
    ours.stage.journal.say("decode-0", "ready", "ready")
    chromium.until(f"{tone('decode-0')} === 'good'")
    assert (chromium.evaluate("window.shifts") or 0) < 0.01


def test_dark_and_light_are_chosen(opened: Browser) -> None:
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    light = opened.evaluate(ground)
    opened.evaluate(choose("dark"))
    dark = opened.evaluate(ground)
    assert light != dark
    # The old page is there until the new one begins.
    opened.evaluate("window.isOld = true; location.reload()")
    opened.until(f"!window.isOld && document.readyState === 'complete' && {DRAWN}")
    assert opened.evaluate(ground) == dark
    opened.evaluate(choose(""))
    opened.scheme(dark=True)
    assert opened.evaluate(ground) == dark


def choose(theme: str) -> str:
    chosen = f"document.querySelector('#theme').value = {theme!r}"
    return f"{chosen}; document.querySelector('#theme').dispatchEvent(new Event('change'))"


def test_a_supervisor_that_ends_is_told() -> None:
    with browser() as chromium:
        with served() as ours:
            show(chromium, ours.link())
        chromium.until("document.querySelector('#live').dataset.tone === 'bad'")
        assert chromium.evaluate("document.body.classList.contains('stale')")


@pytest.mark.skipif(AXE is None, reason="NOT TESTED: no axe; scripts/try-dash has it")
@pytest.mark.parametrize("width", [1440, 390])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("dialog", [False, True])
def test_axe_finds_nothing(ours: Served, chromium: Browser, width: int, dark: bool, dialog: bool) -> None:
    """https://github.com/dequelabs/axe-core, all its rules, contrast among them."""
    show(chromium, ours.link(write=True), width, dark)
    chromium.evaluate("document.querySelector('#doctor').scrollIntoView()")
    chromium.until("document.querySelectorAll('#finding-list li').length", 120)
    chromium.evaluate("document.querySelector('tr[data-tone=busy] button').click(); scrollTo(0, 0)")
    if dialog:
        chromium.evaluate("document.querySelector('[data-name=decode-1] .card-name').click()")
        chromium.evaluate("document.querySelector('#details-actions button').click()")
    assert AXE is not None
    chromium.evaluate(Path(AXE).read_text() + ";0")
    kinds = "[found.violations, found.passes]"
    found = chromium.evaluate(f"axe.run().then(found => JSON.stringify({kinds}))")
    violations, passes = json.loads(found)
    assert "color-contrast" in {one["id"] for one in passes}
    told = [
        f"{one['impact']}: {one['id']}: {one['help']}: {[node['target'] for node in one['nodes'][:5]]}"
        for one in violations
    ]
    assert told == []


# Every text that is drawn, with the contrast to the ground that it is on: WCAG 2.1's formula.
CONTRASTS = """
(() => {
  // Mixed colours have parts from 0 to 1.
  const scaled = (colour) => (part, at) => (colour.startsWith('color(') && at < 3 ? part * 255 : part);
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number).map(scaled(colour));
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
  const ground = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const found = parts(getComputedStyle(at).backgroundColor);
      if (found.length === 3 || found[3] > 0.9) return found;
    }
  };
  const seen = (node) => node.checkVisibility({ visibilityProperty: true });
  const drawn = [...document.querySelectorAll('body *')].filter((node) => seen(node)
    && [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim()));
  return JSON.stringify(drawn.map((node) => {
    const [a, b] = [light(parts(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), node.className || node.tagName, node.textContent.trim().slice(0, 30)];
  }));
})()
"""


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_has_contrast(ours: Served, chromium: Browser, dark: bool) -> None:
    """Also where axe cannot tell: below lines of the picture, scrolled out of a list, behind a dialog."""
    ours.stage.change("decode-0", state="starting", last_exit=KILLED)
    ours.stage.change("prefill-1", state="draining")
    show(chromium, ours.link(write=True), 1440, dark)
    chromium.evaluate("document.querySelector('tr[data-tone=busy] button').click()")
    chromium.evaluate("document.querySelector('[data-name=decode-1] .card-name').click()")
    chromium.evaluate("document.querySelector('#details-actions button').click()")
    found = json.loads(chromium.evaluate(CONTRASTS))
    ours.stage.change("decode-0", state="ready", last_exit=None)
    ours.stage.change("prefill-1", state="ready")
    assert len(found) > 150
    assert [one for one in found if one[0] < 4.5] == []


def test_no_text_is_on_a_picture(opened: Browser) -> None:
    """Where its contrast could not be told."""
    plain = "getComputedStyle(node).backgroundImage === 'none' || !node.textContent"
    assert opened.evaluate(f"[...document.querySelectorAll('body *')].every(node => {plain})")
