from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.commands.top.keys import KeyReader


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        (b"q", ["q"]), (b"\x1b[A\x1b[B", ["up", "down"]), (b"\x1bOA", ["up"]), (b"\x1b[5~j", ["page-up", "j"]),
        (b"\x1b[1;5H", ["home"]), (b"\x1b[4~", ["end"]), (b"\x03\x1a", ["ctrl-c", "ctrl-z"]), (b"\r", ["enter"]),
        (b"\x1b\x1b[A", ["escape", "up"]), (b"\x1b[15~", []), (b"\x1bx", []), ("é".encode(), ["é"]), (b"\x00", []),
        (b"\x1b[200~", []), (b"\x1b[<0;10;10M", []),
    ],
)  # fmt: skip
def test_keys(data: bytes, keys: list[str]) -> None:
    assert KeyReader().feed(data) == keys


def test_a_sequence_in_parts_and_a_lone_escape() -> None:
    reader = KeyReader()
    assert reader.feed(b"\x1b") == []
    assert reader.feed(b"[") == []
    assert reader.quiet() == [], "the rest of a sequence is no key"
    assert reader.feed(b"\x1b") == []
    assert reader.quiet() == ["escape"]
    assert reader.quiet() == []
    assert reader.feed(b"\x1b[") + reader.feed(b"6") + reader.feed(b"~") == ["page-down"]


@given(st.lists(st.sampled_from([b"q", b"\x1b[A", b"\x1bOB", b"\x1b[6~", b"\r", b"\x1b[99x"]), max_size=12),
       st.lists(st.integers(0, 60), max_size=6))  # fmt: skip
def test_it_does_not_matter_how_the_bytes_are_cut(parts: list[bytes], cuts: list[int]) -> None:
    data = b"".join(parts)
    places = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    reader = KeyReader()
    found = [key for begin, end in pairwise(places) for key in reader.feed(data[begin:end])]
    assert found == KeyReader().feed(data)


@given(st.binary(max_size=60))
def test_any_bytes(data: bytes) -> None:
    reader = KeyReader()
    for key in reader.feed(data) + reader.quiet() + reader.feed(b"\x03"):
        assert len(key) == 1 or key.replace("-", "").isalpha()
