"""The search for the highest rate, and the choice of what to break."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from pdctl.bench.chaos import Seen, pick
from pdctl.bench.sweep import Search


def searched(knee: float, first: float = 1.0) -> Search:
    search = Search(first)
    while (rate := search.next()) is not None:
        search.tried.append((rate, 1.0 if rate <= knee else 0.5))
    return search


@given(st.floats(0.05, 500))
def test_the_knee_is_found(knee: float) -> None:
    search = searched(knee)
    assert search.held <= knee
    assert len(search.tried) <= 16
    assert knee / search.held < 1.11, search.tried


def test_nothing_holds() -> None:
    search = searched(0.0)
    assert search.held == 0.0
    assert len(search.tried) <= 8


def test_what_is_broken_next() -> None:
    names = ["decode-0", "decode-1", "prefill-0", "proxy"]
    rng = random.Random(1)
    chosen = {pick(names, ["kill:decode", "freeze:proxy"], rng) for _ in range(99)}
    assert chosen == {("kill", "decode-0"), ("kill", "decode-1"), ("freeze", "proxy")}
    assert pick(names, ["kill:prefill-0"], rng) == ("kill", "prefill-0")
    assert pick(names, ["kill:nothing"], rng) is None


def test_promises() -> None:
    assert Seen(answered=5).broken == []
    seen = Seen(failed={"x": 2, "y": 1}, truncated=1, wrong=4, recovered=[1.0, None])
    assert seen.broken == [
        "3 requests failed", "1 streams were cut", "4 answers differ from the quiet ones",
        "1 processes did not come back in time",
    ]  # fmt: skip
