"""Which way to bring the KV of a prompt's beginning is taken, by predictions."""

from __future__ import annotations

import asyncio
from functools import partial
from types import SimpleNamespace
from typing import cast

from pdctl.engine.front.core_client import CoreClient
from pdctl.engine.front.kv_events import short
from pdctl.engine.front.prefixes.bringing import Bringer
from pdctl.engine.front.prefixes.feed import BlockFeed
from pdctl.engine.front.prefixes.names import BlockNames
from pdctl.engine.front.prefixes.prompt import Prompt, Way
from pdctl.engine.ipc.messages import KvStored, Ready
from pdctl.latency import StepTimes, Work
from tests.engine.front.handover.rig import ENDPOINT

# 10 ms for each token of a prompt; blocks of 4 tokens.
SLOW = Work(StepTimes((0.0, 0.01, 0.0, 0.0, 0.0)), 512)
FAST = Work(StepTimes((0.0, 1e-7, 0.0, 0.0, 0.0)), 512)
TOKENS = list(range(41))


class Elsewhere:
    """A source. `has`: blocks, and the seconds that they take."""

    def __init__(self, *has: tuple[int, float]) -> None:
        self.has = has
        self.asked = 0
        self.brought: list[int] = []

    async def ways(self, prompt: Prompt) -> list[Way]:
        self.asked += 1

        async def bring(count: int) -> None:
            self.brought.append(count)

        return [Way(count, seconds, partial(bring, count)) for count, seconds in self.has]


def made(*sources: Elsewhere, work: Work | None = SLOW, always: bool = False, here: int = 0) -> Bringer:
    """With so many of the prompt's blocks here."""
    ready = Ready(ENDPOINT, 100, 4, 1000, 512, 1000, "", "")
    core = cast(CoreClient, SimpleNamespace(ready=ready, endpoint=ENDPOINT, books=SimpleNamespace(work=work)))
    feed, names = BlockFeed("e"), BlockNames(core)
    feed.take([KvStored(list(names.whole(TOKENS, here, "")), None, [])])
    return Bringer(core, feed, names, sources, always)


def brought(bringer: Bringer) -> None:
    asyncio.run(bringer.bring(TOKENS, ""))


def test_what_saves_most_is_taken() -> None:
    far, near = Elsewhere((10, 0.1)), Elsewhere((3, 0.001), (6, 0.2))
    brought(made(far, near))
    assert (far.brought, near.brought) == ([10], []), "saves 0.32 - 0.1 s; the others 0.096 and below"
    far.has = ((10, 0.3),)
    brought(made(far, near))
    assert near.brought == [3]


def test_what_saves_nothing_is_not_taken() -> None:
    slow = Elsewhere((10, 0.33))
    brought(made(slow))
    brought(made(slow, work=None))
    assert not slow.brought
    has = Elsewhere((5, 0.001))
    brought(made(has, here=5))
    assert not has.brought, "it is here already"


def test_what_takes_no_time_to_compute_is_not_looked_for() -> None:
    near = Elsewhere((10, 0.0))
    brought(made(near, work=FAST))
    assert not near.asked


def test_always_takes_the_most() -> None:
    near, far = Elsewhere((3, 0.001)), Elsewhere((10, 60.0), (10, 50.0))
    brought(made(near, far, always=True, work=None))
    assert (near.brought, far.brought) == ([], [10])


def test_the_last_token_is_always_computed() -> None:
    names = BlockNames(cast(CoreClient, SimpleNamespace(ready=SimpleNamespace(block_size=4), endpoint=ENDPOINT)))
    feed = BlockFeed("e")
    assert Prompt(range(40), "", names, feed).num_blocks == 9
    assert Prompt(range(41), "", names, feed).num_blocks == 10
    prompt = Prompt(range(41), "x", names, feed)
    assert prompt.own(10) == 0
    feed.take([KvStored(prompt.names(3), None, []), KvStored(prompt.names(6)[5:], None, [])])
    assert [prompt.own(count) for count in (2, 3, 10)] == [2, 3, 3]
    assert list(prompt.short_names()) == [short(name) for name in prompt.names(10)]
