"""The search for the highest rate, and the choice of faults."""

from __future__ import annotations

import asyncio
import random
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.bench import Asked, Record
from pdctl.bench.chaos import Difference, Fault, Observations, _note, carry_out, difference, expected, pick
from pdctl.bench.client import Endpoint
from pdctl.bench.sweep import Search
from pdctl.commands.bench.sweep import _curves, _row
from tests.bench.fake import Fake, listening


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
    fault = Fault("kill", "decode-0", (1,))
    assert Observations(answered=5, compared=5, faults=[fault]).broken == []
    assert Observations(answered=5, compared=5).broken == ["no fault was injected: nothing was tested"]
    assert Observations(answered=5, faults=[fault]).broken == [
        "no answer could be compared: answers already differed before any fault was injected"
    ]
    assert Observations(faults=[fault]).broken == ["no request was answered"]
    observed = Observations(
        1, {"x": 2, "y": 1}, 1, compared=1, unsteady=2, wrong=4, faults=[fault], recovered=[1.0, None]
    )
    assert observed.broken == [
        "3 requests failed", "1 streams were cut off",
        "2 greedy requests gave different answers before any fault was injected",
        "4 answers differ from those before the first fault",
        "1 processes were not ready again in time",
    ]  # fmt: skip


def test_the_quiet_run_is_as_busy_as_the_other() -> None:
    async def quiet(fake: Fake, streams: int) -> list[str | None]:
        async with listening(fake) as url:
            return (await expected(Endpoint(url, "fake"), [Asked([n], 3 + n) for n in range(3)], streams))[0]

    fake = Fake(first_s=0.02, gap_s=0.0)
    assert asyncio.run(quiet(fake, 6)) == [" t0 t1 t2", " t0 t1 t2 t3", " t0 t1 t2 t3 t4"]
    assert fake.most_at_once == 6
    for streams in (1, 6):
        assert asyncio.run(quiet(Fake(first_s=0.0, gap_s=0.0, words=("t", "u")), streams)) == [None] * 3
    with pytest.raises(ValueError, match="status 503"):
        asyncio.run(quiet(Fake(status=503), 2))


def test_what_cannot_be_compared_is_not_called_wrong() -> None:
    observed = Observations()
    for text in ("x", None):
        _note(observed, Record(0.0, 1.0, 1.5, 2.0, [0.25], text="y"), text)
    assert (observed.answered, observed.compared, observed.wrong) == (2, 1, 1)
    for _ in range(500):
        _note(observed, Record(0.0, 1.0, 1.5, 2.0, [0.25], text="y"), "x")
    assert (observed.wrong, len(observed.differing)) == (501, 100), "all are counted, some are kept"


@given(st.lists(st.integers(0, 3), max_size=12), st.data())
def test_what_differs(quiet: list[int], data: st.DataObject) -> None:
    assert difference(quiet, quiet) == Difference()
    begin = data.draw(st.integers(0, len(quiet)))
    end = data.draw(st.integers(begin, len(quiet)))
    without, twice = quiet[:begin] + quiet[end:], quiet[:end] + quiet[begin:]
    assert difference(quiet, without) == Difference(lost=end - begin)
    found = difference(quiet, twice)
    assert found.repeated + found.other == end - begin
    assert found.lost == 0
    assert difference(quiet, [*quiet[:begin], 7, *quiet[begin + 1 :]]) == Difference(other=1)


def test_tokens_that_come_twice() -> None:
    text = ["the", "cat", "sat", "on", "the", "mat"]
    assert difference(text, text[:3] + text[1:]) == Difference(repeated=2)
    assert difference(text, [*text[:4], "a", "b", *text[4:]]) == Difference(other=2)
    assert difference(text, [*text[:2], *text[4:], "x"]) == Difference(lost=2, other=1)
    assert difference(text, []) == Difference(lost=6)


def test_a_stream_that_was_sent_into_a_fault_has_met_it() -> None:
    observed = Observations(fault_times=[10.0, 50.0], recovered=[5.0])
    for sent, ended in ((1.0, 9.0), (9.0, 11.0), (12.0, 20.0), (14.9, 30.0), (15.5, 49.0), (60.0, 61.0)):
        _note(observed, Record(0.0, sent, sent + 0.5, ended, [0.25], text="x"), "x")
    assert len(observed.pauses) == 4, "before the first, and between the two, nothing was met; the second is not over"


def test_a_freeze_ends_when_told() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        waited: list[float] = []
        carry_out(Fault("freeze", "decode-0", (process.pid,)), 3600.0, waited.append)
        assert waited == [3600.0]
        carry_out(Fault("kill", "decode-0", (process.pid,)), 3600.0, waited.append)
        assert process.wait(20) == -9


def test_a_rate_at_which_nothing_was_answered_has_no_times() -> None:
    rows = [
        {
            "rate": 1.0,
            "goodput": 0.9,
            "attainment": 0.9,
            "p99_ttft_ms": 80.0,
            "p99_tpot_ms": 9.0,
            "completed": 20.0,
            "streams": 0.0,
        },
        {
            "rate": 8.0,
            "goodput": 0.0,
            "attainment": 0.0,
            "p99_ttft_ms": 0.0,
            "p99_tpot_ms": 0.0,
            "completed": 0.0,
            "streams": 0.0,
        },
    ]
    found = _curves(rows, 0.9)
    assert found["ttft"].lines == {"TTFT p99": [(1.0, 80.0)]}
    assert found["goodput"].lines["goodput"] == [(1.0, 0.9), (8.0, 0.0)]
    assert _row(rows[1]) == ["8", "0", "0%", "-", "-"]
    assert _row(rows[0])[3:] == ["80", "-"], "answers of one token have no time per token"
