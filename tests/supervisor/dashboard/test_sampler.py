"""When samples are taken, and who is told."""

from __future__ import annotations

import asyncio

import pytest

from pdctl.control_api import KvStatus
from pdctl.supervisor.dashboard import sampler
from pdctl.supervisor.dashboard.rates import Look
from pdctl.supervisor.dashboard.sampler import Sampler, Viewers
from tests.supervisor.dashboard.loop import in_loop

EMPTY = Look({}, KvStatus(engines=(), leases=(), unreachable={}), {})


class Looks:
    """Counts the looks, and says when there were as many as wanted."""

    def __init__(self, wanted: int) -> None:
        self.count = 0
        self.enough = asyncio.Event()
        self._wanted = wanted

    async def __call__(self) -> Look:
        self.count += 1
        if self.count == self._wanted:
            self.enough.set()
        return EMPTY


async def samples_until(looks: Looks, viewers: Viewers) -> Sampler:
    found = Sampler(looks, viewers)
    async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(found.run_forever())
        await looks.enough.wait()
        running.cancel()
    return found


@in_loop
async def test_a_sample_has_its_time() -> None:
    found = Sampler(Looks(1), Viewers())
    await found.sample()
    await found.sample()
    first, second = found.history.after(0.0)["at"]
    assert first is not None
    assert second is not None
    assert first <= second
    assert found.now() >= second - 0.001
    assert found.last is EMPTY


@in_loop
async def test_while_nobody_looks_there_are_few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rest without a viewer ends by its own time: were it the one for viewers, this test would never end."""
    monkeypatch.setattr(sampler, "WATCHED_S", 1e9)
    monkeypatch.setattr(sampler, "IDLE_S", 0.01)
    await samples_until(Looks(4), Viewers())


@in_loop
async def test_while_somebody_looks_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "WATCHED_S", 0.01)
    monkeypatch.setattr(sampler, "IDLE_S", 1e9)
    viewers = Viewers()
    with viewers.watching():
        await samples_until(Looks(4), viewers)


@in_loop
async def test_a_first_viewer_need_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "IDLE_S", 1e9)
    viewers, looks = Viewers(), Looks(2)
    found = Sampler(looks, viewers)
    async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(found.run_forever())
        while not looks.count:
            await asyncio.sleep(0)
        with viewers.watching():
            await looks.enough.wait()
        running.cancel()


def test_viewers_are_told_until_they_leave() -> None:
    viewers = Viewers()
    with viewers.watching() as one, viewers.watching() as other:
        viewers.pulse()
        assert one.is_set()
        assert other.is_set()
        assert len(viewers) == 2
    assert len(viewers) == 0
    one.clear()
    viewers.pulse()
    assert not one.is_set()
