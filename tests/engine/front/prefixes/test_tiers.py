"""KV comes back from the tiers: between a front and a simulated core."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from pdctl.engine.front.prefixes import prompt as prompts
from pdctl.engine.front.prefixes import tiers
from pdctl.engine.front.prefixes.feed import BlockFeed
from pdctl.engine.front.prefixes.names import BlockNames
from pdctl.engine.front.prefixes.prompt import Prompt, Way
from pdctl.engine.front.prefixes.tiers import TierLoader
from pdctl.engine.ipc.messages import (
    Abort,
    Books,
    Failed,
    Keep,
    KvStored,
    Load,
    Look,
    Pulled,
    Ready,
    Reserve,
    Reserved,
    Seen,
    StepDone,
)
from tests.engine.front.handover.rig import ENDPOINT, Rig, rig

TOKENS = list(range(50, 67))  # 4 blocks, and the last token


def run(test: Callable[[Rig, TierLoader, Prompt, BlockFeed], Awaitable[None]]) -> None:
    async def main() -> None:
        async with rig() as found:
            found.core.link.ready = Ready(ENDPOINT, 100, 4, 1000, 512, 1000, "", "")
            feed = BlockFeed("e")
            prompt = Prompt(TOKENS, "s", BlockNames(found.core.link), feed)
            await test(found, TierLoader(found.core.link), prompt, feed)
            await found.core.hears_nothing()
            assert not found.core.link._requests, "nothing waits for the core"

    asyncio.run(main())


async def ways(found: Rig, loader: TierLoader, prompt: Prompt, *runs: tuple[int, float]) -> list[Way]:
    asked = asyncio.ensure_future(loader.ways(prompt))
    look = await found.core.next(Look)
    await found.core.say(Seen(look.request_id, list(runs)))
    return await asked


def test_only_what_is_not_here_is_asked_for() -> None:
    async def test(found: Rig, loader: TierLoader, prompt: Prompt, feed: BlockFeed) -> None:
        feed.take([KvStored(prompt.names(1), None, [])])
        asked = asyncio.ensure_future(loader.ways(prompt))
        look = await found.core.next(Look)
        assert look.names == prompt.names(4)[1:]
        await found.core.say(Seen(look.request_id, [(1, 0.1), (3, 0.2)]))
        assert [(way.num_blocks, way.seconds) for way in await asked] == [(2, 0.1), (4, 0.2)]
        feed.take([KvStored(prompt.names(4)[1:], None, [])])
        assert await loader.ways(prompt) == []

    run(test)


def test_blocks_are_reserved_loaded_and_kept() -> None:
    async def test(found: Rig, loader: TierLoader, prompt: Prompt, feed: BlockFeed) -> None:
        [way] = await ways(found, loader, prompt, (4, 0.1))
        work = asyncio.ensure_future(way.bring())
        reserve = await found.core.next(Reserve)
        assert (reserve.kv_tokens, reserve.token_ids, reserve.salt, reserve.only_now) == (16, TOKENS[:16], "s", True)
        # The first block came meanwhile, by another request.
        await found.core.say(Reserved(reserve.request_id, [9, 4, 5, 6], 4))
        assert await found.core.next(Load) == Load(reserve.request_id, prompt.names(4)[1:], [4, 5, 6])
        # One was not there any more.
        await found.core.say(Pulled(reserve.request_id, "", 0.1, 100, blocks=2))
        assert await found.core.next(Keep) == Keep(reserve.request_id, 0, 12)
        await work
        assert (loader.totals.prefixes, loader.totals.tokens, loader.totals.lost) == (1, 8, 0)

    run(test)


@pytest.mark.parametrize("how", ["no room", "nothing came", "too slow", "client leaves"])
def test_whatever_goes_wrong_frees_the_blocks(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "_LEAST_S", 0.2 if how == "too slow" else 600.0)
    monkeypatch.setattr(prompts, "_MOST_S", 0.2 if how == "too slow" else 600.0)

    async def test(found: Rig, loader: TierLoader, prompt: Prompt, feed: BlockFeed) -> None:
        [way] = await ways(found, loader, prompt, (4, 0.01))
        work = asyncio.ensure_future(way.bring())
        request = (await found.core.next(Reserve)).request_id
        if how == "no room":
            await found.core.say(StepDone([], [], [Failed(request, "no room")], Books()))
        else:
            await found.core.say(Reserved(request, [3, 4, 5, 6]))
            await found.core.next(Load)
        if how == "nothing came":
            await found.core.say(Pulled(request, "it is not there any more", 0.0, 0))
        if how == "client leaves":
            work.cancel()
        await asyncio.wait([work])
        assert work.cancelled() == (how == "client leaves")
        assert await found.core.next(Abort) == Abort(request)
        assert (loader.totals.prefixes, loader.totals.lost) == (0, 1)

    run(test)


def test_a_core_that_does_not_answer_costs_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "_LOOK_S", 0.05)

    async def test(found: Rig, loader: TierLoader, prompt: Prompt, feed: BlockFeed) -> None:
        assert await loader.ways(prompt) == []
        await found.core.next(Look)

    run(test)
