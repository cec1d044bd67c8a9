"""One state machine over blocks with reference counts, prefix table, scheduler, receptions and leases of two engines.

Rules come in any order; all audits run after each. Slots hold the tokens that they were computed from, and nothing once
they are freed, so a wrong or a freed block is noticed when it is read. That all this can fail is shown by thirteen
deliberate faults, each of which the same verbs must find: see `FAULTS`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from pdctl.engine.cache import prefix
from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.handover.lease import LeaseTable, Verdict
from pdctl.engine.ipc.messages import Progress
from pdctl.engine.schedule import scheduler as scheduling
from pdctl.engine.schedule.ahead import LAUNCHED
from pdctl.engine.schedule.peers import moves
from pdctl.engine.schedule.room import Room
from pdctl.engine.schedule.scheduler import Scheduler
from pdctl.engine.schedule.sequence import Sequence
from tests.engine.machine.hand_overs import LEASE_S, Pair, Request, guessing
from tests.engine.schedule.test_ahead import extra_token_sent, freed_a_step_early

ENGINES = st.sampled_from(["p", "d"])


class TwoEngines(RuleBasedStateMachine):
    """Two engines, and everything that can happen to them."""

    pair: Pair

    @initialize(blocks=st.integers(14, 30), seed=st.integers(0, 2**16), ahead=st.booleans())
    def begin(self, blocks: int, seed: int, ahead: bool) -> None:
        self.patch = pytest.MonkeyPatch()
        chance = random.Random(seed)
        guessing(self.patch, chance)
        self.pair = Pair(chance, blocks, ahead)

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            try:
                self.pair.finish()
            finally:
                self.patch.undo()

    @rule(
        where=ENGINES, family=st.integers(0, 2), length=st.integers(0, 24), output=st.integers(2, 24),
        salt=st.sampled_from(["", "x"]), kind=st.sampled_from(["whole", "held", "offered"]), stops=st.integers(0, 20),
    )  # fmt: skip
    def add(self, where: str, family: int, length: int, output: int, salt: str, kind: str, stops: int) -> None:
        request = Request.made(family, length, output, salt, range(stops))
        if kind == "whole":
            self.pair.ask(getattr(self.pair, where), request)
        else:
            self.pair.ask(self.pair.p, request, hold=True, offer=kind == "offered")

    @rule(times=st.integers(1, 20))
    def go_on(self, times: int) -> None:
        for _ in range(times):
            self.pair.go_on()
            self.pair.audit()

    @rule(where=ENGINES, count=st.integers(1, 4))
    def step(self, where: str, count: int) -> None:
        for _ in range(count):
            self.pair.step(getattr(self.pair, where))

    @rule(where=ENGINES, data=st.data())
    def abort(self, where: str, data: st.DataObject) -> None:
        engine = getattr(self.pair, where)
        if names := sorted(engine.scheduler.sequences):
            self.pair.leave(engine, data.draw(st.sampled_from(names)))

    @rule(where=ENGINES)
    def preempt(self, where: str) -> None:
        self.pair.preempt(getattr(self.pair, where))

    @precondition(lambda self: self.pair.movable())
    @rule(data=st.data(), offer=st.booleans())
    def move(self, data: st.DataObject, offer: bool) -> None:
        self.pair.move(data.draw(st.sampled_from(self.pair.movable())), offer)

    @precondition(lambda self: self.pair.readable)
    @rule(data=st.data())
    def receive(self, data: st.DataObject) -> None:
        self.pair.receive(data.draw(st.sampled_from(sorted(self.pair.readable))))

    @rule()
    def reserve(self) -> None:
        self.pair.reserve()

    def reading(self) -> list[str]:
        return [name for name, moving in self.pair.moving.items() if moving.reading is not None]

    def committing(self) -> list[str]:
        return [name for name, moving in self.pair.moving.items() if moving.committing]

    @precondition(lambda self: self.reading())
    @rule(data=st.data(), count=st.integers(1, 12))
    def pull(self, data: st.DataObject, count: int) -> None:
        self.pair.read(data.draw(st.sampled_from(self.reading())), count)

    @precondition(lambda self: self.reading())
    @rule(data=st.data(), how=st.sampled_from(["whole", "whole", "whole", "failed", "late"]))
    def pulled(self, data: st.DataObject, how: str) -> None:
        self.pair.end_read(data.draw(st.sampled_from(self.reading())), how)

    @precondition(lambda self: self.pair.late)
    @rule(data=st.data())
    def land(self, data: st.DataObject) -> None:
        self.pair.land(data.draw(st.sampled_from(sorted(self.pair.late))))

    @precondition(lambda self: self.pair.late)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        self.pair.settle(data.draw(st.sampled_from(sorted(self.pair.late))))

    @precondition(lambda self: self.committing())
    @rule(data=st.data(), is_answered=st.booleans())
    def commit(self, data: st.DataObject, is_answered: bool) -> None:
        self.pair.commit(data.draw(st.sampled_from(self.committing())), is_answered)

    @rule()
    def renew(self) -> None:
        self.pair.renew()

    @rule(seconds=st.sampled_from([1.0, LEASE_S / 2, LEASE_S + 1]))
    def expire(self, seconds: float) -> None:
        self.pair.pass_time(seconds)

    @precondition(lambda self: self.pair.leases.live())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.pair.leases.live()))
        if lease.sealed:
            self.pair.verdict(self.pair.leases.revoke(lease.lease_id, self.pair.now))

    @invariant()
    def books_hold(self) -> None:
        if hasattr(self, "pair"):
            self.pair.audit()


TestTwoEngines = TwoEngines.TestCase
TestTwoEngines.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)


# -- deliberate faults ---------------------------------------------------------------------------------------


def _commit_of_anything(patch: pytest.MonkeyPatch) -> None:
    """COMMIT succeeds although the lease has ended: its blocks may hold something else by then."""
    patch.setattr(LeaseTable, "commit", lambda self, lease_id, epoch, holder, now: (
        found if (found := commit(self, lease_id, epoch, holder, now)).ok else Verdict(True)
    ))  # fmt: skip


def _no_quarantine(patch: pytest.MonkeyPatch) -> None:
    """The blocks of a read that was given up are free at once, and used when its bytes arrive."""
    patch.setattr(BlockAllocator, "quarantine", lambda self, owner: (
        self.free(owner), self._quarantine.setdefault(owner, [])
    ))  # fmt: skip


def _freed_while_pulled(patch: pytest.MonkeyPatch) -> None:
    """An abort frees blocks although a transfer writes to them."""

    def abort(self: Scheduler, request_id: str) -> None:
        if (sequence := self.sequences.get(request_id)) is not None:
            self._room.release(sequence)
            sequence.block_ids = []
        whole_abort(self, request_id)

    whole_abort = Scheduler.abort
    patch.setattr(Scheduler, "abort", abort)


def _rejected_guesses_named(patch: pytest.MonkeyPatch) -> None:
    """Blocks get their names when they are full, not when their tokens are known to be right."""

    def take(self: Scheduler, piece: Any, sampled: Any, outcome: Any) -> None:
        sequence, known = piece.sequence, list(piece.sequence.token_ids)
        sequence.token_ids = [*known, *piece.drafts]
        computed, sequence.num_computed = sequence.num_computed, sequence.num_computed + len(piece.drafts)
        self._room._name(sequence)
        sequence.token_ids, sequence.num_computed = known, computed
        whole_take(self, piece, sampled, outcome)

    whole_take = Scheduler._take
    patch.setattr(Scheduler, "_take", take)


def _wrong_guesses_taken(patch: pytest.MonkeyPatch) -> None:
    """A guess is taken although the one before it was wrong."""
    patch.setattr(scheduling, "accepted", lambda drafts, sampled: iter(sampled))


def _one_block_too_many_given_back(patch: pytest.MonkeyPatch) -> None:
    """What a rejected guess gives back includes a block with computed tokens."""

    def trim(self: Room, sequence: Sequence) -> None:
        sequence.num_computed -= 1
        whole_trim(self, sequence)
        sequence.num_computed += 1

    whole_trim = Room.trim
    patch.setattr(Room, "trim", trim)


def _names_of_a_block_alone(patch: pytest.MonkeyPatch) -> None:
    """A block's name leaves out what came before it."""
    patch.setattr(prefix, "following", lambda before, tokens: following(b"", tokens))


def _shared_blocks_freed(patch: pytest.MonkeyPatch) -> None:
    """The first owner that lets go of a shared block frees it."""

    def share(self: BlockAllocator, owner: str, blocks: list[int]) -> None:
        counts = [max(1, self._owners[block]) for block in blocks]
        whole_share(self, owner, blocks)
        for block, count in zip(blocks, counts, strict=True):
            self._owners[block] = count

    whole_share = BlockAllocator.share
    patch.setattr(BlockAllocator, "share", share)


def _held_a_token_later(patch: pytest.MonkeyPatch) -> None:
    """A moved sequence is held one token later than its reader was told."""

    def begin(sequence: Sequence, *others: Any) -> bool:
        began = whole_begin(sequence, *others)
        sequence.hold_at += began and sequence.offer
        return began

    whole_begin = moves.begin
    patch.setattr(moves, "begin", begin)
    patch.setattr(scheduling, "Progress", lambda name, blocks, computed, tokens: (
        Progress(name, blocks, computed, max(0, tokens - 1))
    ))  # fmt: skip


def _moved_but_not_pinned(patch: pytest.MonkeyPatch) -> None:
    """The blocks of a moved sequence do not count as those for a peer."""
    patch.setattr(Room, "pin", lambda self, sequence: setattr(sequence, "hold", True))


def _expired_but_kept(patch: pytest.MonkeyPatch) -> None:
    """An expired lease does not free its blocks."""
    patch.setattr(LeaseTable, "expire", lambda self, now: [
        Verdict(verdict.ok, verdict.reason) for verdict in expire(self, now)
    ])  # fmt: skip


commit, expire, following = LeaseTable.commit, LeaseTable.expire, prefix.following
FAULTS: list[Callable[[pytest.MonkeyPatch], None]] = [
    _commit_of_anything, _no_quarantine, _freed_while_pulled, _rejected_guesses_named, _wrong_guesses_taken,
    _one_block_too_many_given_back, _names_of_a_block_alone, _shared_blocks_freed, _expired_but_kept,
    _held_a_token_later, _moved_but_not_pinned, freed_a_step_early, extra_token_sent,
]  # fmt: skip


def wander(seeds: range) -> int:
    """Long random walks, which go deeper than the state machine's examples; the number of steps launched ahead."""
    launched = 0
    for seed in seeds:
        chance = random.Random(seed)
        with pytest.MonkeyPatch.context() as patch:
            guessing(patch, chance)
            pair = Pair(chance, chance.randint(14, 30), ahead=seed % 2 == 1)
            pair.wander(250)
            pair.finish()
            launched += sum(engine.scheduler.ahead.asked.get(LAUNCHED, 0) for engine in (pair.p, pair.d))
    return launched


def test_long_walks_find_nothing() -> None:
    assert wander(range(40)) > 400


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__.strip("_"))
def test_a_fault_is_found(fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    with pytest.raises((AssertionError, KeyError, IndexError)):
        wander(range(100))
