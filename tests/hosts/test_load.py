"""The clients of the trials notice what they are there to notice."""

from __future__ import annotations

import json

import pytest

from tests.hosts.lab import Lab
from tests.hosts.load import Answer, Outcome, Streams


def event(*tokens: int) -> bytes:
    return b"data: " + json.dumps({"choices": [{"token_ids": tokens}]}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("sent", "kind"),
    [
        (event(1) + event(2, 3) + DONE, "exact"),
        (event(1) + event(9), "wrong"),
        (event(1) + DONE, "wrong"),
        (event(1, 2, 3) + event(4), "wrong"),
        (event(1) + b'data: {"error": {"message": "no engine", "code": 503}}\n\n', "refused"),
        (event(1) + b'data: {"error": {"code": 503}}\n\n', "wrong"),
        (event(1), None),
    ],
)
def test_a_stream_is_compared_as_it_arrives(sent: bytes, kind: str | None) -> None:
    for size in (1, 7, len(sent)):
        answer = Answer([1, 2, 3])
        verdicts = [answer.take(sent[at : at + size]) for at in range(0, len(sent), size)]
        found = next((verdict for verdict in verdicts if verdict is not None), None)
        assert (found[0] if found is not None else None) == kind


@pytest.mark.parametrize(
    ("kind", "detail", "gone", "may_refuse", "counts"),
    [
        ("exact", "", (), False, False),
        ("elsewhere", "", (), False, False),
        ("wrong", "", ("a",), True, True),
        ("cut", "", (), True, True),
        ("cut", "", ("a",), False, False),
        ("silent", "", ("b",), True, True),
        ("silent", "", ("a",), True, False),
        ("refused", "503 no engine", ("a",), False, True),
        ("refused", "503 no engine", (), True, False),
        ("refused", "500 a crash", (), True, True),
    ],
)
def test_what_counts_as_a_broken_promise(
    kind: str, detail: str, gone: tuple[str, ...], may_refuse: bool, counts: bool
) -> None:
    streams = Streams(Lab.__new__(Lab), {}, [], {})
    streams.outcomes.append(Outcome("a", kind, 0.0, 1.0, 3, 0.1, detail))
    assert bool(streams.violations(gone, may_refuse)) == counts
