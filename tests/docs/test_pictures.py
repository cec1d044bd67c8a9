"""The README's pictures: drawn by their scripts, readable, small, and without anything from elsewhere."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from tests.docs.picture import IMAGES, PALETTES, drawn
from tests.docs.terminal import Recording
from tests.docs.terminal import drawn as played

_SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("name", PALETTES)
def test_the_service_is_drawn_as_the_script_draws_it(name: str) -> None:
    text = (IMAGES / f"service-{name}.svg").read_text()
    assert text == drawn(PALETTES[name]), "draw it again with: scripts/docs picture"
    ElementTree.fromstring(text)


@pytest.mark.parametrize("name", PALETTES)
def test_texts_can_be_read(name: str) -> None:
    """WCAG's contrast AA, of every colour of a text to both grounds."""
    colours = PALETTES[name]
    for ground in (colours.ground, colours.panel):
        for text in (colours.text, colours.soft, colours.prefill, colours.decode, colours.moves):
            assert _contrast(text, ground) >= 4.5, (text, ground)


def _contrast(one: str, other: str) -> float:
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_the_demo_is_small_and_shows_the_kill() -> None:
    path = IMAGES / "demo.svg"
    text = path.read_text()
    assert path.stat().st_size < 300_000
    assert not re.findall(r"(?:href|src|url)[=(]\W*http", text)
    words = " ".join(node.text or "" for node in ElementTree.fromstring(text).iter(f"{_SVG}text"))
    assert "kill -9" in words
    assert "killed by SIGKILL" in words
    assert "no leaked leases" in words
    assert "pdctl is down" in words


def test_a_line_that_is_written_over_disappears() -> None:
    made = Recording(40)
    made.write("50%")
    made.wait(1)
    made.write("\r\x1b[K100%\n")
    assert [(span.text, span.start, span.end) for span in made.spans] == [("50%", 0, 1), ("100%", 1, None)]


def test_long_lines_are_wrapped_and_colours_dropped() -> None:
    made = Recording(4)
    made.write("\x1b[31mabcdef\x1b[0m")
    assert [(span.row, span.column, span.text) for span in made.spans] == [(0, 0, "abcd"), (1, 0, "ef")]


def test_what_comes_at_once_is_one_text_and_the_rest_comes_later() -> None:
    made = Recording(40)
    made.write("a")
    made.write("b")
    made.wait(1)
    made.write("c")
    assert [(span.text, span.start) for span in made.spans] == [("ab", 0), ("c", 1)]


def test_a_screen_that_is_full_scrolls() -> None:
    made = Recording(40)
    for number in range(5):
        made.write(f"{number}\n")
        made.wait(1)
    text = played(made, 3, "a note")
    assert "translateY(-51px)" in text, "three of six rows are above the view in the end"
    ElementTree.fromstring(text)
