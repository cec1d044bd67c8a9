from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pdctl.commands.top.lines import bar, chart, clean, in_ascii, milliseconds, rate, trend


def test_nothing_that_a_terminal_obeys_is_left() -> None:
    assert clean("\x1b[31mred\x1b[0m \x1b]0;title\x07 a\tb\r\x9b2J") == "red  a    b2J"
    assert clean("\x1b[2Jgone\x1bM\u202etxet") == "gonetxet"


@given(st.text())
def test_clean_text_has_no_controls(text: str) -> None:
    assert not [c for c in clean(text) if ord(c) < 32 or 127 <= ord(c) < 160]
    assert clean(clean(text)) == clean(text)


@given(st.floats(-1, 2), st.integers(1, 20))
def test_a_bar(part: float, width: int) -> None:
    drawn = bar(part, width)
    assert len(drawn) == width
    assert (drawn.strip() == "") == (part <= 0), "what is used is seen, however little"
    assert (drawn == "█" * width) == (round(part * width * 8) >= width * 8)


def test_a_trend_rises() -> None:
    assert trend([0.0, 1.0, 2.0, 4.0], 6) == "  ▁▂▄█"
    assert trend([1.0, None, 1.0], 3) == "█ █"
    assert trend([0.0, 0.0], 2) == "▁▁", "nothing is not a gap"
    assert trend([9.0, 1.0, 2.0], 2) == "▄█", "the last ones, on a scale of their own"
    assert trend([], 3) == "   "


@given(st.lists(st.none() | st.floats(0, 1e6), max_size=50), st.integers(0, 40), st.integers(1, 5))
def test_a_chart_is_a_rectangle(values: list[float | None], width: int, height: int) -> None:
    drawn = chart(values, width, height)
    assert [len(line) for line in drawn] == [width] * height
    for column in zip(*drawn, strict=True):
        solid = "".join(column).lstrip(" ")
        assert set(solid[1:]) <= {"█"}, "no hole below the top"


def test_numbers() -> None:
    assert [milliseconds(value) for value in (None, 0.0094, 0.12, 1.2)] == ["-", "9.4ms", "120ms", "1.20s"]
    assert [rate(value) for value in (None, 0.0, 4.2, 310.4)] == ["-", "0", "4.2", "310"]


@given(st.text(alphabet="▁▂▃▄▅▆▇█▏▎▍▌▋▊▉●○✗→←▲▼▶│├└─…é中a "))
def test_ascii(text: str) -> None:
    assert in_ascii(text).isascii()
    assert len(in_ascii(text)) == len(text)
