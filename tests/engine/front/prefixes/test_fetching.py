"""Fetching and lending between fronts with simulated cores: what is worth it, what arrives, what is given back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from pdctl.engine.cache import prefix
from pdctl.engine.front.handover.lease_desk import boot_time
from pdctl.engine.front.handover.offers import Identity, OfferDesk
from pdctl.engine.front.handover.peers import Abandoned
from pdctl.engine.front.kv_events import short
from pdctl.engine.front.prefixes import lending
from pdctl.engine.front.prefixes import prompt as prompts
from pdctl.engine.front.prefixes.bringing import Bringer
from pdctl.engine.front.prefixes.directory import Directory
from pdctl.engine.front.prefixes.feed import BlockFeed
from pdctl.engine.front.prefixes.fetching import PrefixFetcher
from pdctl.engine.front.prefixes.lending import LendingDesk
from pdctl.engine.front.prefixes.names import BlockNames
from pdctl.engine.handover.lease import LeaseState
from pdctl.engine.ipc.messages import (
    Abort,
    Books,
    Failed,
    Find,
    Found,
    Keep,
    KvStored,
    Pull,
    Pulled,
    Ready,
    Reserve,
    Reserved,
    StepDone,
)
from pdctl.latency import StepTimes, Work
from pdctl.net.http_client import Unreachable
from pdctl.wire import AttemptCall, BlocksReply, KvEndpoint, Offer, PeerAddress, PrefixCall, PrefixReply
from tests.engine.front.handover.rig import ENDPOINT, HOLDER, TOKENS, Rig, rig

PEER = PeerAddress("p0", "127.0.0.1", 1, "pe")
# Blocks of 4 tokens: see ENDPOINT.
PROMPT = list(range(50, 50 + TOKENS + 1))
SLOW = Work(StepTimes((0.0, 0.1, 0.0, 0.0, 0.0)), 512)
FAST = Work(StepTimes((0.0, 1e-6, 0.0, 0.0, 0.0)), 512)


def run(test: Callable[[Rig], Awaitable[None]]) -> None:
    async def main() -> None:
        async with rig() as found:
            await test(found)

    asyncio.run(main())


def named(tokens: list[int], salt: str = "") -> list[bytes]:
    """The names of these tokens' blocks, without a secret."""
    name, found = prefix.salted(prefix.root(ENDPOINT.manifest), salt), []
    for start in range(0, len(tokens) - 3, 4):
        name = prefix.following(name, tokens[start : start + 4])
        found.append(name)
    return found


class Fetching:
    """A fetcher whose peer has told what it has. `lend`: its answer."""

    def __init__(self, found: Rig, always: bool = False, work: Work | None = SLOW) -> None:
        self.rig = found
        self.feed, self.directory = BlockFeed("de"), Directory()
        found.core.link.ready = Ready(ENDPOINT, 100, 4, 1000, 512, 1000, "", "")
        found.core.link.books = Books(work=work)
        self.directory.follow(PEER)
        self.calls: list[PrefixCall] = []
        self.reply: Offer | Unreachable | None = None
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        found.peers.prefix = self.lend  # type: ignore[method-assign]
        link, names = found.core.link, BlockNames(found.core.link)
        self.fetcher = PrefixFetcher(link, self.directory, found.peers, found.links, found.receiver)
        self.bringer = Bringer(link, self.feed, names, [self.fetcher], always)

    async def lend(self, host: str, port: int, call: PrefixCall) -> PrefixReply:
        self.calls.append(call)
        await self.may_answer.wait()
        if isinstance(self.reply, Unreachable):
            raise self.reply
        return PrefixReply(self.reply)

    def has(self, tokens: list[int], salt: str = "") -> None:
        """The peer tells that it has these tokens."""
        names = [short(name) for name in named(tokens, salt)]
        self.directory.heard("p0", BlocksReply("pe", 1, True, names, []))

    def lends(self, tokens: int) -> str:
        """The peer lends so many tokens; returns the lease."""
        lease = self.rig.prefill.desk.grant("r-at-prefill", tokens // 4, HOLDER, "")
        assert lease is not None
        blocks = list(range(1, 1 + tokens // 4))
        self.reply = Offer(
            "p0", "127.0.0.1", self.rig.prefill.port, lease.lease_id, "pe", 600.0, tokens, tokens, blocks, ENDPOINT
        )
        return lease.lease_id


def test_what_a_peer_has_is_read_certified_and_kept() -> None:
    async def test(found: Rig) -> None:
        made = Fetching(found)
        made.has(PROMPT[:8], "s")
        lease = made.lends(8)
        work = asyncio.ensure_future(made.bringer.bring(PROMPT, "s"))
        core_id = f"kv.{lease}"
        assert await found.core.next(Reserve) == Reserve(core_id, 8, PROMPT[:8], "s", only_now=True)
        await found.core.say(Reserved(core_id, [4, 5]))
        assert await found.core.next(Pull) == Pull(core_id, "p0", "pe", ENDPOINT, [1, 2], [4, 5], 0, 8)
        await found.core.say(Pulled(core_id, "", 0.5, 100))
        assert await found.core.next(Keep) == Keep(core_id, 0)
        await work
        [call] = made.calls
        assert (call.holder, call.token_ids, call.salt) == (HOLDER, PROMPT[:8], "s")
        assert found.prefill.desk.table.ended[LeaseState.COMMITTED] == 1
        assert (made.fetcher.totals.prefixes, made.fetcher.totals.tokens, made.fetcher.totals.lost) == (1, 8, 0)
        await found.core.hears_nothing()

    run(test)


def test_only_what_is_worth_it_is_asked_for() -> None:
    async def test(found: Rig) -> None:
        cases: tuple[tuple[Work | None, bool, list[int], bool], ...] = (
            (FAST, False, PROMPT, False),
            (None, False, PROMPT, False),
            (None, True, PROMPT, True),
            (SLOW, False, PROMPT, True),
            (SLOW, False, PROMPT[:8], True),
            (SLOW, False, PROMPT[:4], False),  # its last token must be computed
            (SLOW, False, [1, *PROMPT], False),
        )
        for work, always, prompt, asks in cases:
            made = Fetching(found, always, work)
            made.has(PROMPT[:8])
            await made.bringer.bring(prompt, "")
            assert bool(made.calls) == asks, prompt
            if asks:
                assert made.calls[0].token_ids == PROMPT[: (len(prompt) - 1) // 4 * 4]
        made = Fetching(found)
        made.has(PROMPT[:8])
        made.feed.take([KvStored(named(PROMPT[:8]), None, [])])
        await made.bringer.bring(PROMPT, "")
        await made.bringer.bring(PROMPT, "another salt")
        assert not made.calls, "it is here already"
        await found.core.hears_nothing()

    run(test)


def test_a_peer_that_fails_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(found: Rig) -> None:
        made = Fetching(found)
        made.has(PROMPT[:8])
        made.reply = Unreachable("it is gone")
        await made.bringer.bring(PROMPT, "")
        await made.bringer.bring(PROMPT, "")
        assert len(made.calls) == 1
        assert made.fetcher.totals.lost == 1
        monkeypatch.setattr("time.monotonic", lambda: 1e9)
        await made.bringer.bring(PROMPT, "")
        assert len(made.calls) == 2

    run(test)


def test_a_loan_of_nothing_new_is_given_back() -> None:
    async def test(found: Rig) -> None:
        made = Fetching(found)
        made.has(PROMPT[:8])
        made.feed.take([KvStored(named(PROMPT[:4]), None, [])])
        lease = made.lends(4)
        await made.bringer.bring(PROMPT, "")
        assert (await found.prefill.call("release")).lease_id == lease  # type: ignore[union-attr]
        await found.core.hears_nothing()
        assert made.fetcher.totals.prefixes == 0

    run(test)


@pytest.mark.parametrize("how", ["no room", "read fails", "too slow", "client leaves"])
def test_whatever_goes_wrong_leaves_nothing_on_either_side(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "_LEAST_S", 0.2 if how == "too slow" else 600.0)
    monkeypatch.setattr(prompts, "_MOST_S", 0.2 if how == "too slow" else 600.0)

    async def test(found: Rig) -> None:
        made = Fetching(found)
        made.has(PROMPT[:8])
        lease = made.lends(8)
        core_id = f"kv.{lease}"
        work = asyncio.ensure_future(made.bringer.bring(PROMPT, ""))
        await found.core.next(Reserve)
        if how == "no room":
            await found.core.say(StepDone([], [], [Failed(core_id, "no room")], Books()))
        else:
            await found.core.say(Reserved(core_id, [4, 5]))
            await found.core.next(Pull)
        if how == "read fails":
            await found.core.say(Pulled(core_id, "broken", 0.1, 0))
        if how == "client leaves":
            work.cancel()
        await asyncio.wait([work])
        assert work.cancelled() == (how == "client leaves")
        assert await found.core.next(Abort) == Abort(core_id)
        assert await found.prefill.core.next(Abort) == Abort("r-at-prefill")
        assert not found.prefill.desk.table.live()
        assert made.fetcher.totals.lost == (how != "client leaves")
        assert found.receiver.totals.lost == 0, "no hand-over was lost"

    run(test)


@pytest.mark.parametrize("how", ["too slow", "client leaves"])
def test_a_loan_without_an_answer_is_given_up(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer may grant it later: nobody would read it, and it would be held for the time of a lease."""
    monkeypatch.setattr(prompts, "_MOST_S", 0.1 if how == "too slow" else 600.0)
    monkeypatch.setattr(prompts, "_LEAST_S", 600.0)

    async def test(found: Rig) -> None:
        made, given_up = Fetching(found), list[object]()
        monkeypatch.setattr(found.peers, "release_later", given_up.append)
        made.has(PROMPT[:8])
        made.may_answer.clear()
        work = asyncio.ensure_future(made.bringer.bring(PROMPT, ""))
        while not made.calls:
            await asyncio.sleep(0)
        if how == "client leaves":
            work.cancel()
        await asyncio.wait([work])
        assert given_up == [Abandoned(PEER.host, PEER.port, made.calls[0].attempt)]
        assert made.fetcher.totals.lost == (how == "too slow")
        await found.core.hears_nothing()

    run(test)


def test_kv_that_could_not_be_found_here_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that computes in segments finds only whole ones."""

    async def test(found: Rig) -> None:
        made = Fetching(found)
        ready = found.core.link.ready
        assert ready is not None
        [pool] = ready.endpoint.shards
        ours = msgspec.structs.replace(pool, manifest=msgspec.structs.replace(pool.manifest, segment=8))
        found.core.link.ready = msgspec.structs.replace(ready, endpoint=KvEndpoint((ours,)))
        made.has(PROMPT[:8])
        lease = made.lends(8)
        await made.bringer.bring(PROMPT, "")
        await made.bringer.bring(PROMPT, "")
        assert len(made.calls) == 1, "not asked again at once"
        assert (await found.prefill.call("release")).lease_id == lease  # type: ignore[union-attr]
        await found.core.hears_nothing()

    run(test)


class Lending:
    """The lender's side of a rig: its core is the prefill engine's."""

    def __init__(self, found: Rig, tasks: asyncio.TaskGroup) -> None:
        core = found.prefill.core
        core.link.ready = Ready(ENDPOINT, 100, 4, 1000, 512, 1000, "", "")
        tasks.create_task(core.link.receive())
        identity = Identity("p0", "pe", "127.0.0.1", 1, 600.0)
        desk = OfferDesk(identity, core.link, found.prefill.desk, found.peers, tasks)
        self.core, self.desk = core, LendingDesk(core.link, found.prefill.desk, desk)


class _Over(Exception):
    """Ends the tasks of a test."""


def run_lending(test: Callable[[Rig, Lending], Awaitable[None]]) -> None:
    async def main() -> None:
        async with rig() as found:
            try:
                async with asyncio.TaskGroup() as tasks:
                    await test(found, Lending(found, tasks))
                    raise _Over
            except* _Over:
                pass

    asyncio.run(main())


def test_a_loan_is_a_lease_and_its_end_frees_the_blocks() -> None:
    async def test(found: Rig, made: Lending) -> None:
        asked = asyncio.ensure_future(made.desk.lend(PrefixCall(HOLDER, "a1", PROMPT, "s")))
        find = await made.core.next(Find)
        assert (find.token_ids, find.salt) == (PROMPT, "s")
        await made.core.say(Found(find.request_id, [7, 8], 8))
        offer = (await asked).offer
        assert offer is not None
        assert (offer.num_tokens, offer.readable, offer.block_ids, offer.epoch) == (8, 8, [7, 8], "pe")
        [lease] = found.prefill.desk.table.live()
        assert (lease.lease_id, lease.holder, lease.sealed) == (offer.lease_id, HOLDER, True)
        assert made.desk.lent == 1
        for verdict in found.prefill.desk.table.release_holder(HOLDER, 1e12):
            assert verdict.freed == find.request_id

    run_lending(test)


def test_a_loan_that_is_given_up_after_it_was_granted_ends() -> None:
    async def test(found: Rig, made: Lending) -> None:
        asked = asyncio.ensure_future(made.desk.lend(PrefixCall(HOLDER, "a1", PROMPT, "")))
        find = await made.core.next(Find)
        await made.core.say(Found(find.request_id, [7, 8], 8))
        assert (await asked).offer is not None
        assert found.prefill.desk.give_up(AttemptCall("a1")).released == 1
        assert await made.core.next(Abort) == Abort(find.request_id)
        assert not found.prefill.desk.table.live()

    run_lending(test)


@pytest.mark.parametrize("how", ["nothing here", "core silent", "caller gone", "caller dead", "given up"])
def test_what_is_not_lent_is_not_held(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending, "_FIND_S", 0.1 if how == "core silent" else 600.0)

    async def test(found: Rig, made: Lending) -> None:
        asked = asyncio.ensure_future(made.desk.lend(PrefixCall(HOLDER, "a1", PROMPT, "")))
        find = await made.core.next(Find)
        if how == "caller dead":
            found.prefill.desk.table.release_holder(HOLDER, boot_time())
        if how == "given up":
            found.prefill.desk.give_up(AttemptCall("a1"))
        if how in ("nothing here", "caller dead", "given up"):
            blocks = [7] if how != "nothing here" else []
            await made.core.say(Found(find.request_id, blocks, 4 * len(blocks)))
        if how == "caller gone":
            asked.cancel()
        await asyncio.wait([asked])
        assert asked.cancelled() or (await asked).offer is None
        assert await made.core.next(Abort) == Abort(find.request_id)
        assert not found.prefill.desk.table.live()

    run_lending(test)
