"""The trace checker detects each kind of violation."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.trace_check import check

Event = dict[str, Any]


def trace(*events: Event) -> list[Event]:
    clock = itertools.count()
    return [{"at": next(clock), "engine": "p", "epoch": "e", "lease": "L", **event} for event in events]


GRANT = {"event": "grant", "request": "r"}
CLAIM = {"event": "claim", "holder": "d", "ok": True}
COMMIT = {"event": "commit", "holder": "d", "ok": True}
ENDED = {"event": "ended"}


def phase(name: str) -> Event:
    return {"event": "advance", "engine": "d", "epoch": "f", "request": "q", "phase": name}


GOOD = (GRANT, CLAIM, phase("reading"), phase("committing"), COMMIT, ENDED, phase("decoding"))


def test_a_good_trace_passes() -> None:
    assert check(trace(*GOOD)) == len(GOOD)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ((GRANT, GRANT), "granted twice"),
        ((CLAIM,), "claimed without grant"),
        ((GRANT, CLAIM, {**CLAIM, "holder": "other"}), "two holders"),
        ((GRANT, ENDED, CLAIM), "claimed after its end"),
        ((GRANT, COMMIT), "committed by a stranger"),
        ((GRANT, CLAIM, ENDED, COMMIT), "committed after its end"),
        ((GRANT, CLAIM, COMMIT, ENDED, ENDED), "ended twice"),
        ((GRANT, CLAIM, phase("reading"), phase("decoding")), "decoded uncertified KV"),
        ((GRANT, CLAIM, {**COMMIT, "ok": False}, phase("decoding")), "decoded uncertified KV"),
        ((*GOOD, phase("reading")), "moved after its end"),
        ((GRANT, phase("lost"), CLAIM, COMMIT, phase("decoding")), "moved after its end"),
    ],
)
def test_each_fault_is_caught(events: tuple[Event, ...], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(trace(*events))
