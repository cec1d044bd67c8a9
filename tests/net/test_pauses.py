"""A process that stood still has not seen what others did; one that is always late must judge them all the same."""

import asyncio
from types import SimpleNamespace

import pytest

from pdctl.net import pauses
from pdctl.net.pauses import Sleeper


@pytest.mark.parametrize(
    ("late_s", "told"),
    [
        ([0.0, 5.0, 0.0, 5.0], [False, True, False, True]),
        ([5.0] * 6, [True, True, True, False, False, False]),
        ([5.0, 5.0, 5.0, 5.0, 0.5, 5.0], [True, True, True, False, False, True]),
    ],
    ids=["single pauses", "too little CPU for good", "enough again"],
)
def test_pauses_are_told_but_not_without_end(
    monkeypatch: pytest.MonkeyPatch, late_s: list[float], told: list[bool]
) -> None:
    now, left = [1000.0], list(late_s)

    async def sleep(seconds: float) -> None:
        now[0] += seconds + left.pop(0)

    monkeypatch.setattr(pauses, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(pauses, "asyncio", SimpleNamespace(sleep=sleep))

    async def work() -> list[bool]:
        sleeper = Sleeper()
        return [await sleeper.overslept(0.1) for _ in late_s]

    assert asyncio.run(work()) == told
