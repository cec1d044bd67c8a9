"""The decode side of a hand-over: its messages to its core and the prefill engine, and its cleanup."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdctl.engine.front.handover import receiver as module
from pdctl.engine.handover.lease import Lease, LeaseState
from pdctl.engine.handover.reception import ReceptionEvent
from pdctl.engine.ipc.messages import Abort, Failed, Pull, Pulled, Reserve, Reserved, Start, StepDone, Submit, Token
from pdctl.engine.ipc.messages import Books as CoreBooks
from pdctl.wire import LeaseCall, LeaseReply, RenewCall, RenewReply, RevokeCall
from tests.engine.front.handover.rig import ENDPOINT, HOLDER, TOKENS, Act, Reader, Reply, Rig, cut, rig


def run(test: Callable[[Rig], Awaitable[None]], renews: bool = False, core_listens: bool = True) -> None:
    async def main() -> None:
        async with rig(renews, core_listens) as found:
            await test(found)

    asyncio.run(main())


def step(*tokens: Token, failed: tuple[Failed, ...] = ()) -> StepDone:
    return StepDone(list(tokens), [], list(failed), CoreBooks())


async def reserved(found: Rig, core_id: str = "r1") -> None:
    """The core reserves blocks for a request that the front submitted."""
    assert (await found.core.next(Submit)).request_id == core_id
    await found.core.say(Reserved(core_id, [4, 5]))


async def pulled(found: Rig, error: str = "", uncertain: bool = False) -> Pull:
    """The core gets a Pull and executes it."""
    pull = await found.core.next(Pull)
    await found.core.say(Pulled(pull.request_id, error, 0.5, 0 if error else 100, uncertain))
    return pull


async def freed_at_prefill(found: Rig) -> None:
    """Check that the lease has ended and the prefill engine's core frees its blocks."""
    assert await found.prefill.core.next(Abort) == Abort("r-at-prefill")
    assert not found.prefill.desk.table.live()
    found.prefill.desk.table.audit()


def ended(found: Rig) -> dict[LeaseState, int]:
    """The number of ended leases at the prefill engine, by final state."""
    return {state: count for state, count in found.prefill.desk.table.ended.items() if count}


async def lost(found: Rig, reader: Reader, core_id: str = "r1") -> str:
    """Check a reader whose KV is lost: its blocks here and at the prefill engine are freed. Returns the reason."""
    why = await reader.lost()
    # Both the reception and the end of the request's context send an Abort. The core ignores the second one.
    assert {await found.core.next(Abort), await found.core.next(Abort)} == {Abort(core_id)}
    await freed_at_prefill(found)
    assert (found.receiver.totals.lost, found.receiver.totals.hand_overs) == (1, 0)
    return why


def held_until(event: asyncio.Event, found: Rig, verb: str) -> Act:
    """The desk's answer, once `event` is set."""

    async def act(call: LeaseCall | RenewCall) -> Reply:
        await event.wait()
        return await found.prefill.answer(verb, call)

    return act


def lost_answer(found: Rig, verb: str) -> Act:
    """The call is executed, but its answer is lost."""

    async def act(call: LeaseCall | RenewCall) -> None:
        await found.prefill.answer(verb, call)

    return act


def test_kv_is_claimed_pulled_committed_and_then_decoded() -> None:
    async def test(found: Rig) -> None:
        lease = found.prefill.grant()
        reader = found.reader(found.given(lease))
        await reserved(found)
        assert await found.prefill.call("claim") == LeaseCall(lease.lease_id, "pe", HOLDER)
        assert await pulled(found) == Pull("r1", "p0", "pe", ENDPOINT, [1, 2], [4, 5], 0, TOKENS)
        assert await found.prefill.call("commit") == LeaseCall(lease.lease_id, "pe", HOLDER)
        assert await found.core.next(Start) == Start("r1")
        await freed_at_prefill(found)
        core_id, events = await reader.begun
        assert core_id == "r1"
        await found.core.say(step(Token("r1", 9, None)))
        assert await events.get() == Token("r1", 9, None)
        await reader.leave()
        assert await found.core.next(Abort) == Abort("r1"), "the end of the request frees its blocks here"
        totals = found.receiver.totals
        assert (totals.hand_overs, totals.pulls, totals.bytes, totals.seconds, totals.lost) == (1, 1, 100, 0.5, 0)
        assert totals.early == 0
        assert reader.stages["bytes"] == 100
        assert set(reader.stages) == {"admission", "hand_over", "bytes"}
        assert ended(found) == {LeaseState.COMMITTED: 1}

    run(test)


@pytest.mark.parametrize("first", ["claim", "blocks"])
def test_nothing_is_pulled_before_the_lease_is_claimed_and_blocks_are_there(first: str) -> None:
    async def test(found: Rig) -> None:
        lease, may_answer = found.prefill.grant(), asyncio.Event()
        found.prefill.act("claim", held_until(may_answer, found, "claim"))
        found.reader(found.given(lease))
        submit = await found.core.next(Submit)
        assert (submit.await_kv, submit.kv_tokens) == (True, TOKENS)
        if first == "claim":
            may_answer.set()
            await found.told.until(ReceptionEvent.CLAIM_OK, lease.lease_id)
        else:
            await found.core.say(Reserved("r1", [4, 5]))
            await found.told.until(ReceptionEvent.RESERVED, lease.lease_id)
        await found.core.hears_nothing()
        may_answer.set()
        await found.core.say(Reserved("r1", [4, 5]))
        await found.core.next(Pull)

    run(test)


def test_a_lease_that_has_ended_is_not_read() -> None:
    async def test(found: Rig) -> None:
        lease = found.prefill.grant()
        found.prefill.desk.revoke(RevokeCall(lease.lease_id))
        reader = found.reader(found.given(lease))
        await found.core.next(Submit)
        assert "claim_refused" in await lost(found, reader)
        assert [verb for verb, _ in [await found.prefill.calls.get(), await found.prefill.calls.get()]] == [
            "claim", "release",
        ]  # fmt: skip

    run(test)


def test_a_prefill_engine_that_is_gone_is_a_loss_at_once() -> None:
    async def test(found: Rig) -> None:
        lease = found.prefill.grant()
        found.prefill.act("claim", cut)
        reader = found.reader(found.given(lease))
        await found.core.next(Submit)
        why = await lost(found, reader)
        assert "claim_refused" in why
        assert "closed the connection" in why

    run(test)


@pytest.mark.parametrize("uncertain", [False, True])
def test_a_pull_that_fails_is_a_loss_and_is_not_counted(uncertain: bool) -> None:
    async def test(found: Rig) -> None:
        lease = found.prefill.grant()
        reader = found.reader(found.given(lease))
        await reserved(found)
        await pulled(found, "the wire broke", uncertain)
        why = await lost(found, reader)
        assert "the KV of p0 was lost (read_failed): the wire broke" in why
        assert (found.receiver.totals.pulls, found.receiver.totals.bytes) == (0, 0)
        assert ended(found) == {LeaseState.RELEASED: 1}

    run(test)


def test_a_request_that_the_core_cannot_serve_is_a_loss() -> None:
    async def test(found: Rig) -> None:
        lease = found.prefill.grant()
        reader = found.reader(found.given(lease))
        await found.core.next(Submit)
        await found.core.say(step(failed=(Failed("r1", "too long for this engine"),)))
        assert "too long for this engine" in await lost(found, reader)

    run(test)


def test_kv_that_is_not_certified_is_not_decoded() -> None:
    async def test(found: Rig) -> None:
        lease = found.prefill.grant()
        reader = found.reader(found.given(lease))
        await reserved(found)
        pull = await found.core.next(Pull)
        found.prefill.desk.revoke(RevokeCall(lease.lease_id))
        await found.core.say(Pulled(pull.request_id, "", 0.5, 100))
        assert "commit_refused" in await lost(found, reader)
        assert ended(found) == {LeaseState.REVOKED: 1}

    run(test)


def test_a_commit_whose_answer_is_lost_is_asked_for_again() -> None:
    async def test(found: Rig) -> None:
        lease = found.prefill.grant()
        found.prefill.act("commit", lost_answer(found, "commit"), cut)
        reader = found.reader(found.given(lease))
        await reserved(found)
        await pulled(found)
        assert await found.core.next(Start) == Start("r1")
        await reader.begun
        assert [(await found.prefill.calls.get())[0] for _ in range(4)] == ["claim", "commit", "commit", "commit"]
        assert ended(found) == {LeaseState.COMMITTED: 1}

    run(test)


def test_a_commit_that_is_never_answered_is_a_loss() -> None:
    async def test(found: Rig) -> None:
        lease = found.prefill.grant()
        found.prefill.act("commit", *[cut] * 4)  # the first one used a kept-alive connection: retried once
        reader = found.reader(found.given(lease))
        await reserved(found)
        await pulled(found)
        assert "commit_unanswered" in await lost(found, reader)
        assert [(await found.prefill.calls.get())[0] for _ in range(6)] == ["claim", *["commit"] * 4, "release"]
        assert ended(found) == {LeaseState.RELEASED: 1}

    run(test)


def test_a_deadline_ends_the_wait_and_frees_both_sides() -> None:
    async def test(found: Rig) -> None:
        reader = found.reader(found.given(found.prefill.grant()), deadline_s=0.0)
        await found.core.next(Submit)
        assert "deadline" in await lost(found, reader)

    run(test)


@pytest.mark.parametrize("at", ["claim", "pull", "commit"])
def test_a_client_that_leaves_frees_both_sides_whatever_is_under_way(at: str) -> None:
    async def test(found: Rig) -> None:
        lease, never = found.prefill.grant(), asyncio.Event()
        if at != "pull":
            found.prefill.act(at, held_until(never, found, at))
        reader = found.reader(found.given(lease))
        await reserved(found)
        await found.prefill.call("claim")
        if at == "commit":
            await pulled(found)
            await found.prefill.call("commit")
        elif at == "pull":
            await found.core.next(Pull)
        reader.task.cancel()
        await asyncio.wait([reader.task])
        assert reader.task.cancelled()
        assert await found.core.next(Abort) == Abort("r1")
        assert await found.prefill.call("release") == LeaseCall(lease.lease_id, "pe", HOLDER)
        await freed_at_prefill(found)
        assert found.receiver.totals.lost == 0, "nothing was lost: no request needed it"

    run(test)


def test_a_client_that_leaves_before_the_core_was_told_frees_both_sides() -> None:
    async def test(found: Rig) -> None:
        lease = found.prefill.grant()
        reader = found.reader(found.given(lease))
        await found.prefill.call("claim")
        reader.task.cancel()
        assert await found.prefill.call("release") == LeaseCall(lease.lease_id, "pe", HOLDER)
        await freed_at_prefill(found)
        found.core.listen()
        assert await found.core.next(Abort) == Abort("r1")
        await found.core.hears_nothing()

    run(test, core_listens=False)


def test_a_hand_over_is_read_by_one_request_and_once() -> None:
    async def test(found: Rig) -> None:
        lease = found.prefill.grant()
        reader = found.reader(found.given(lease))
        await reserved(found)
        assert "is being read by another request" in await found.reader(found.given(lease), "r2").lost()
        await pulled(found)
        assert await found.core.next(Start) == Start("r1"), "the first one continues"
        await reader.begun
        await reader.leave()
        await found.core.next(Abort)
        assert "has been read here before" in await found.reader(found.given(lease), "r3").lost()
        assert [(await found.prefill.calls.get())[0] for _ in range(3)] == ["claim", "commit", "release"]
        await found.core.hears_nothing()

    run(test)


class TestEarly:
    def test_what_is_here_is_not_read(self) -> None:
        async def test(found: Rig) -> None:
            lease = found.prefill.grant(sealed=False)
            core_id, known = f"kv.{lease.lease_id}", list(range(TOKENS))
            assert found.offer(lease, 3, token_ids=known, salt="x").ok
            assert await found.core.next(Reserve) == Reserve(core_id, TOKENS, known, "x")
            await found.core.say(Reserved(core_id, [4, 5], 4))
            await found.told.until(ReceptionEvent.RESERVED, lease.lease_id)
            await found.told.until(ReceptionEvent.CLAIM_OK, lease.lease_id)
            await found.core.hears_nothing()  # three tokens are readable, and four are here
            assert found.offer(lease, 6).ok
            piece = await found.core.next(Pull)
            assert (piece.first, piece.count) == (4, 2)

        run(test)

    def test_tokens_that_do_not_fit_the_offer_are_not_used(self) -> None:
        async def test(found: Rig) -> None:
            lease = found.prefill.grant(sealed=False)
            assert found.offer(lease, 3, token_ids=[1, 2], salt="x").ok
            assert await found.core.next(Reserve) == Reserve(f"kv.{lease.lease_id}", TOKENS, [], "x")

        run(test)

    def test_chunks_are_read_as_they_come_and_the_request_takes_over(self) -> None:
        async def test(found: Rig) -> None:
            lease = found.prefill.grant(sealed=False)
            core_id = f"kv.{lease.lease_id}"
            assert found.offer(lease, 3).ok
            assert await found.core.next(Reserve) == Reserve(core_id, TOKENS)
            await found.core.say(Reserved(core_id, [4, 5]))
            first = await found.core.next(Pull)
            assert (first.request_id, first.target_blocks, first.first, first.count) == (core_id, [4, 5], 0, 3)
            assert found.offer(lease, 5).ok
            for _ in range(2):
                await found.told.until(ReceptionEvent.OFFERED, lease.lease_id)
            await found.core.hears_nothing()  # one piece at a time
            await found.core.say(Pulled(core_id, "", 0.5, 30))
            second = await pulled(found)
            assert (second.first, second.count) == (3, 2)
            for _ in range(2):
                await found.told.until(ReceptionEvent.READ_OK, lease.lease_id)
            assert found.prefill.desk.seal(lease.lease_id, 2) is not None
            reader = found.reader(found.given(lease))
            assert (await found.core.next(Submit)).request_id == core_id
            last = await pulled(found)
            assert (last.request_id, last.first, last.count) == (core_id, 5, 3)
            assert await found.core.next(Start) == Start(core_id)
            assert (await reader.begun)[0] == core_id
            await freed_at_prefill(found)
            totals = found.receiver.totals
            assert (totals.hand_overs, totals.early, totals.pulls, totals.bytes) == (1, 1, 3, 230)
            assert reader.stages["bytes"] == 230

        run(test)

    def test_a_request_that_overtakes_its_offers_reserves_for_itself(self) -> None:
        async def test(found: Rig) -> None:
            lease = found.prefill.grant()
            assert found.offer(lease, TOKENS).ok
            reader = found.reader(found.given(lease))
            core_id = f"kv.{lease.lease_id}"
            # The two messages may arrive in either order. The core treats them as one request.
            messages = [await found.core.any()]
            if isinstance(messages[0], Reserve):
                messages.append(await found.core.any())
            assert isinstance(messages[-1], Submit)
            await found.core.say(Reserved(core_id, [4, 5]))
            await pulled(found)
            assert await found.core.next(Start) == Start(core_id)
            await reader.begun

        run(test)

    def test_what_is_withdrawn_is_dropped_and_never_read_again(self) -> None:
        async def test(found: Rig) -> None:
            lease = found.prefill.grant(sealed=False)
            core_id = f"kv.{lease.lease_id}"
            assert found.offer(lease, 3).ok
            await found.core.next(Reserve)
            assert found.offer(lease, 0, withdrawn=True).ok
            assert {await found.core.next(Abort), await found.core.next(Abort)} == {Abort(core_id)}
            await found.prefill.call("claim")
            await found.prefill.call("release")
            again = found.offer(lease, 3)
            assert (again.ok, again.reason) == (False, f"lease {lease.lease_id} has ended here")
            assert "has been read here before" in await found.reader(found.given(lease)).lost()
            await found.core.hears_nothing()
            assert found.receiver.totals.early == 0

        run(test)

    def test_a_withdrawal_that_overtakes_its_offer_is_remembered(self) -> None:
        async def test(found: Rig) -> None:
            lease = found.prefill.grant(sealed=False)
            assert found.offer(lease, 0, withdrawn=True).ok
            assert not found.offer(lease, 3).ok
            await found.core.hears_nothing()
            assert found.prefill.calls.empty()

        run(test)

    def test_a_withdrawal_after_the_request_came_is_the_leases_affair(self) -> None:
        async def test(found: Rig) -> None:
            lease = found.prefill.grant()
            reader = found.reader(found.given(lease))
            await reserved(found)
            await found.core.next(Pull)
            assert found.offer(lease, 0, withdrawn=True).ok
            await found.core.say(Pulled("r1", "", 0.5, 100))
            assert await found.core.next(Start) == Start("r1"), "KV that the desk has confirmed is used"
            await reader.begun

        run(test)

    def test_so_many_are_read_early_and_no_more(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_MAX_EARLY", 1)

        async def test(found: Rig) -> None:
            first, second = found.prefill.grant(sealed=False), found.prefill.grant(sealed=False)
            assert found.offer(first, 3).ok
            refused = found.offer(second, 3)
            assert (refused.ok, refused.reason) == (False, "too many hand-overs in progress here")
            assert found.offer(first, 5).ok, "more of a lease that is being read is still accepted"

        run(test)

    def test_a_request_that_never_comes_leaves_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_LONGEST_PAUSE_S", 0.01)

        async def test(found: Rig) -> None:
            lease = found.prefill.grant()
            assert found.offer(lease, TOKENS, lease_s=0.05).ok
            core_id = f"kv.{lease.lease_id}"
            await found.core.next(Reserve)
            await found.core.say(Reserved(core_id, [4, 5]))
            while isinstance(message := await found.core.any(), Pull):
                pass
            assert message == Abort(core_id)
            assert await found.core.next(Abort) == Abort(core_id)
            await freed_at_prefill(found)
            assert not found.receiver._runs

        run(test, renews=True)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases are renewed almost continuously."""
    monkeypatch.setattr(module, "_LONGEST_PAUSE_S", 0.01)


def gone(call: LeaseCall | RenewCall) -> RenewReply:
    assert isinstance(call, RenewCall)
    return RenewReply(call.lease_ids)


@pytest.mark.usefixtures("often")
class TestRenewals:
    async def _renewed(self, found: Rig, *leases: Lease) -> None:
        """Wait until these leases are renewed, all in one call."""
        while True:
            verb, call = await found.prefill.calls.get()
            if verb == "renew":
                assert isinstance(call, RenewCall)
                if call.lease_ids == [lease.lease_id for lease in leases]:
                    assert (call.epoch, call.holder) == ("pe", HOLDER)
                    return

    def test_all_leases_of_a_peer_are_renewed_in_one_call_until_they_are_read(self) -> None:
        async def test(found: Rig) -> None:
            first, second = found.prefill.grant(), found.prefill.grant()
            readers = [found.reader(found.given(lease), f"r{at}") for at, lease in enumerate((first, second), 1)]
            await reserved(found, "r1")
            await found.core.next(Submit)
            await self._renewed(found, first, second)
            pull = await found.core.next(Pull)
            await found.core.say(Pulled(pull.request_id, "", 0.5, 100))
            await found.core.next(Start)
            await readers[0].begun
            await self._renewed(found, second)

        run(test, renews=True)

    def test_a_lease_that_is_gone_is_a_loss(self) -> None:
        async def test(found: Rig) -> None:
            lease = found.prefill.grant()
            reader = found.reader(found.given(lease))
            await reserved(found)
            await found.core.next(Pull)
            found.prefill.desk.revoke(RevokeCall(lease.lease_id))
            why = await lost(found, reader)
            assert "lease_gone" in why
            assert "its lease is gone" in why

        run(test, renews=True)

    def test_a_renewal_that_overtakes_the_claim_decides_nothing(self) -> None:
        async def test(found: Rig) -> None:
            lease, may_answer = found.prefill.grant(), asyncio.Event()
            found.prefill.act("claim", held_until(may_answer, found, "claim"))
            reader = found.reader(found.given(lease))
            await reserved(found)
            # Before the claim, the desk has no lease of ours. The second renewal shows that the first one's answer was
            # handled.
            await self._renewed(found, lease)
            await self._renewed(found, lease)
            may_answer.set()
            await pulled(found)
            await found.core.next(Start)
            await reader.begun

        run(test, renews=True)

    def test_while_a_commit_is_under_way_its_answer_decides(self) -> None:
        async def test(found: Rig) -> None:
            lease, may_answer = found.prefill.grant(), asyncio.Event()

            async def committed(call: LeaseCall | RenewCall) -> Reply:
                reply = await found.prefill.answer("commit", call)  # from now on renewals are refused
                await may_answer.wait()
                return reply

            found.prefill.act("commit", committed)
            reader = found.reader(found.given(lease))
            await reserved(found)
            await pulled(found)
            await found.told.until("renewal_refused", lease.lease_id)
            may_answer.set()
            assert await found.core.next(Start) == Start("r1")
            await reader.begun

        run(test, renews=True)

    def test_a_peer_that_does_not_answer_is_lost_once_the_lease_must_have_ended(self) -> None:
        async def test(found: Rig) -> None:
            lease = found.prefill.grant()
            found.prefill.act("renew", *[cut] * 10_000)
            patient = found.reader(found.given(found.prefill.grant()), "r0")
            await found.core.next(Submit)
            reader = found.reader(found.given(lease, lease_s=0.05))
            await reserved(found)
            while isinstance(await found.core.any(), Pull):
                pass
            assert "its lease is gone" in await reader.lost()
            assert not patient.task.done(), "its lease may still be live"

        run(test, renews=True)


PULLS = st.sampled_from(["", "", "", "broke"])
CALLS = st.lists(st.sampled_from(["ok", "ok", "cut", "no answer", "refused"]), max_size=4)


@settings(max_examples=60)
@given(
    pull=PULLS, claims=CALLS, commits=CALLS, early=st.booleans(), leaves_at=st.sampled_from([None, None, Submit, Pull])
)
def test_whatever_fails_only_certified_kv_is_decoded_and_nothing_stays(
    pull: str, claims: list[str], commits: list[str], early: bool, leaves_at: type | None
) -> None:
    async def test(found: Rig) -> None:
        lease = found.prefill.grant()
        for verb, answers in (("claim", claims), ("commit", commits)):
            for each in answers:
                found.prefill.act(verb, _answer(found, verb, each))
        if early:
            assert found.offer(lease, TOKENS).ok
        reader = found.reader(found.given(lease))
        core = asyncio.ensure_future(_core(found, reader, pull, leaves_at))
        await asyncio.wait([reader.begun])
        if not reader.begun.cancelled():
            assert ended(found) == {LeaseState.COMMITTED: 1}
            await reader.leave()
        else:
            await asyncio.wait([reader.task])
        assert await core or reader.begun.cancelled(), "decoded without being started"
        await freed_at_prefill(found)
        assert not found.receiver._runs
        assert not found.core.link._requests

    run(test)


def _answer(found: Rig, verb: str, how: str) -> Act:
    async def act(call: LeaseCall | RenewCall) -> Reply | None:
        if how == "refused":
            return LeaseReply(False, "not here")
        if how != "cut":
            reply = await found.prefill.answer(verb, call)
            return reply if how == "ok" else None
        return None

    return act


async def _core(found: Rig, reader: Reader, error: str, leaves_at: type | None) -> bool:
    """A core that executes its messages until the request is aborted. Returns whether it was started."""
    started = False
    while not isinstance(message := await found.core.any(), Abort):
        if type(message) is leaves_at:
            reader.task.cancel()
        if isinstance(message, Submit):
            await found.core.say(Reserved(message.request_id, [4, 5]))
        elif isinstance(message, Pull):
            await found.core.say(Pulled(message.request_id, error, 0.1, 0 if error else 100))
        started = started or isinstance(message, Start)
    return started
