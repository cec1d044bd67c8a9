"""Every interleaving of one hand-over, with the real lease table and the real reception machine.

The environment is adversarial: messages are lost, repeated and late, the deadline may pass at any moment, freed blocks
are reused at any moment on either side, the prefill may be preempted while its first chunk is being read, a read may be
given up while its bytes still arrive, and either engine may die and restart. An engine of several devices is read shard
by shard, under the one lease of its front; one of its ranks may die first, which its front notices later. A rumour may
release the leases of a holder that lives, at any moment, as when a cluster believes that its node is lost. Checked: no
state decodes KV that was overwritten, or not yet computed, when it was read; no late write hits another request's
blocks; and from every state the blocks of both sides can still be freed."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from pdctl.engine.handover.lease import LeaseTable
from pdctl.engine.handover.reception import Action, Phase, Reception, ReceptionEvent, advance

EPOCHS = ("e0", "e1")
HOLDER = "d"
TOTAL = 2  # pieces of KV: the first can be read before the second is computed


@dataclass(frozen=True)
class World:
    """`dirty`: something was read that was overwritten or not computed during the read."""

    table: tuple[object, ...]
    epoch: int = 0
    p_alive: bool = True
    owned: bool = True  # the prefill's blocks are pinned for this request
    reused: bool = False
    computed: int = 1
    d_alive: bool = True
    state: Reception = field(default_factory=Reception)
    reading: int = 0  # shards that are still to be read, one after the other; the first of them is being read
    unread: int = 0  # shards that lack what was asked for
    dirty: bool = False
    p_whole: bool = True  # no rank of the engine is dead
    d_whole: bool = True
    net: frozenset[tuple[str, int | bool]] = frozenset({("offer", 1)})
    faults: int = 0
    late: bool = False  # the clock is past the deadline
    landing: bool = False  # a read that was given up may still write
    target_held: bool = True  # the reader's blocks are in use or in quarantine
    spoiled: bool = False  # a late write hit another request's blocks


class Model:
    """Successors of a state, for a peer of so many shards. Without commit it decodes right after the read; without
    quarantine blocks are freed as soon as their request is lost, both as in other systems. Without `with_all` a read
    counts as done after its first shard. Without verdict, a rumour frees blocks and leaves the lease as it is."""

    def __init__(
        self, with_commit: bool, with_quarantine: bool, shards: int, with_all: bool, with_verdict: bool
    ) -> None:
        self.with_commit = with_commit
        self.with_quarantine = with_quarantine
        self.shards = shards
        self.with_all = with_all
        self.with_verdict = with_verdict
        self.tables: dict[tuple[object, ...], LeaseTable] = {}

    def key(self, table: LeaseTable) -> tuple[object, ...]:
        """The observable state, as a hashable."""
        live = tuple((x.lease_id, x.state, x.holder, x.deadline, x.sealed) for x in table.live())
        tombs = tuple((k, v.state, v.holder) for k, v in table._tombstones.items())
        found = (table.epoch, live, tombs)
        self.tables.setdefault(found, table)
        return found

    def first(self) -> World:
        table = LeaseTable(EPOCHS[0], 10)
        table.grant("r", 1, "proxy", 0, sealed=False)
        return World(self.key(table))

    def successors(self, world: World) -> Iterator[World]:
        yield from self._environment(world)
        if world.p_alive and world.p_whole and world.epoch == 0 and world.computed < TOTAL:
            # A step is done when all ranks have computed it.
            yield from self._prefill(world)
        for message in world.net:
            # It stays in the network: it may be delivered again, or never (lost).
            yield from self._delivered(world, *message)
        if world.d_alive:
            yield from self._decode_side(world)

    # -- the prefill engine --

    def _prefill(self, world: World) -> Iterator[World]:
        table = copy.deepcopy(self.tables[world.table])
        sealed = table.seal(f"{EPOCHS[0]}.1", 1, self._now(world))
        done = replace(world, computed=TOTAL)
        if sealed:
            yield replace(done, table=self.key(table), net=world.net | {("offer", TOTAL), ("ticket", 0)})
        else:
            yield replace(done, owned=False)  # it continues under another lease; this one's blocks are not guaranteed
        if world.owned:
            table = copy.deepcopy(self.tables[world.table])
            table.revoke(f"{EPOCHS[0]}.1", self._now(world))
            preempted = replace(world, table=self.key(table), owned=False, computed=TOTAL)
            yield replace(preempted, net=world.net | {("withdrawn", 0)})

    # -- the adversary --

    def _environment(self, world: World) -> Iterator[World]:
        table = self.tables[world.table]
        if not world.late:
            yield replace(world, late=True)
        if world.p_alive and world.late and table.live():
            moved = copy.deepcopy(table)
            freed = any(verdict.freed for verdict in moved.expire(self._now(world)))
            yield self._after_table(world, moved, freed)
        if not world.owned and not world.reused:
            yield replace(world, reused=True, dirty=world.dirty or bool(world.reading))
        if self.shards > 1 and world.faults == 0:
            yield from self._rank_died(world)
        if world.p_alive and (world.faults == 0 or not world.p_whole):
            yield replace(world, p_alive=False, owned=False, faults=1, dirty=world.dirty or bool(world.reading))
        if not world.p_alive:
            fresh = LeaseTable(EPOCHS[1], 10)
            yield replace(world, p_alive=True, p_whole=True, epoch=1, table=self.key(fresh), reused=True)
        if world.d_alive and (world.faults == 0 or not world.d_whole):
            died = replace(world, d_alive=False, faults=1, reading=0, landing=False, target_held=False)
            yield died
            # the supervisor saw it
            moved = copy.deepcopy(table)
            freed = any(verdict.freed for verdict in moved.release_holder(HOLDER, self._now(world)))
            yield self._after_table(died, moved, freed)
        if world.p_alive and world.epoch == 0:
            yield from self._rumours(world)
        if world.landing:
            spoiled = world.spoiled or not world.target_held
            yield replace(world, landing=False, spoiled=spoiled)

    def _rumours(self, world: World) -> Iterator[World]:
        """A holder is believed to be dead: the proxy, or the reader, alive or not."""
        for holder in ("proxy", HOLDER):
            table = copy.deepcopy(self.tables[world.table])
            freed = any(verdict.freed for verdict in table.release_holder(holder, self._now(world)))
            if freed and self.with_verdict:
                yield self._after_table(world, table, freed)
            elif freed:
                yield replace(world, owned=False)

    def _rank_died(self, world: World) -> Iterator[World]:
        """The front and its memory are still there."""
        if world.p_alive:
            yield replace(world, p_whole=False, faults=1)
        if world.d_alive:
            yield replace(world, d_whole=False, faults=1)

    # -- messages --

    def _delivered(self, world: World, kind: str, value: int | bool) -> Iterator[World]:
        if kind in ("claim", "commit", "release") and world.p_alive:
            yield self._called(world, kind, int(value))
        elif not world.d_alive:
            return
        elif kind == "claim_answer":
            yield self._advance(world, ReceptionEvent.CLAIM_OK if value else ReceptionEvent.CLAIM_REFUSED)
        elif kind == "commit_answer":
            yield self._advance(world, ReceptionEvent.COMMIT_OK if value else ReceptionEvent.COMMIT_REFUSED)
        elif kind == "offer":
            yield self._advance(self._begun(world), ReceptionEvent.OFFERED, int(value))
        elif kind == "ticket":
            yield self._advance(self._begun(world), ReceptionEvent.SEALED, TOTAL)
        elif kind == "withdrawn" and world.state != Reception():
            yield self._advance(world, ReceptionEvent.LEASE_GONE)

    def _called(self, world: World, kind: str, epoch: int) -> World:
        table = copy.deepcopy(self.tables[world.table])
        lease, name, now = f"{EPOCHS[0]}.1", EPOCHS[epoch], self._now(world)
        if kind == "release":
            return self._after_table(world, table, table.release(lease, name, now).freed is not None)
        call = table.claim if kind == "claim" else table.commit
        verdict = call(lease, name, HOLDER, now)
        after = self._after_table(world, table, verdict.freed is not None)
        return replace(after, net=after.net | {(f"{kind}_answer", verdict.ok)})

    def _begun(self, world: World) -> World:
        """The first message of a hand-over makes decode claim the lease."""
        return replace(world, net=world.net | {("claim", 0)}) if world.state == Reception() else world

    # -- the decode engine --

    def _decode_side(self, world: World) -> Iterator[World]:
        phase = world.state.phase
        if phase is Phase.QUEUED:
            if not world.state.reserved:
                yield self._advance(world, ReceptionEvent.RESERVED)
            yield self._advance(world, ReceptionEvent.DEADLINE)
        if phase in (Phase.QUEUED, Phase.READING, Phase.COMMITTING):
            yield self._advance(world, ReceptionEvent.CANCELLED)
        if world.reading:
            yield self._shard_read(world)
            done = replace(world, reading=0)
            yield self._advance(done, ReceptionEvent.READ_FAILED)
            if world.faults == 0:
                # The other shards are not read any more: one read at most is late.
                given_up = replace(done, landing=True, faults=1)
                yield self._advance(given_up, ReceptionEvent.READ_FAILED)
        if phase is Phase.COMMITTING:
            yield self._advance(world, ReceptionEvent.COMMIT_UNANSWERED)
        # Blocks of a lost request that are being written are freed when the read ends.
        busy = world.reading or (self.with_quarantine and world.landing)
        if phase is Phase.LOST and world.target_held and not busy:
            yield replace(world, target_held=False)

    def _shard_read(self, world: World) -> World:
        """One shard is read; what of it is wrong was noted when it began, or when its blocks were reused."""
        left = world.reading - 1
        after = replace(world, unread=world.unread - 1, reading=left if self.with_all else 0)
        if after.reading:
            return self._begun_shard(after)
        return self._advance(after, ReceptionEvent.READ_OK)

    def _begun_shard(self, world: World) -> World:
        stale = not (world.owned and world.epoch == 0 and world.p_alive) and world.reused
        ahead = world.state.asked > world.computed
        return replace(world, dirty=world.dirty or stale or ahead)

    def _advance(self, world: World, event: ReceptionEvent, pieces: int = 0) -> World:
        state, actions = advance(world.state, event, pieces)
        world = replace(world, state=replace(state, reason=""))
        for action in actions:
            if action is Action.READ:
                world = self._begun_shard(replace(world, reading=self.shards, unread=self.shards))
            elif action is Action.COMMIT and not self.with_commit:
                world = replace(world, state=replace(state, phase=Phase.DECODING))
            elif action is Action.COMMIT:
                world = replace(world, net=world.net | {("commit", 0)})
            elif action is Action.RELEASE_LEASE:
                world = replace(world, net=world.net | {("release", 0)})
        return world

    def _after_table(self, world: World, table: LeaseTable, freed: bool) -> World:
        return replace(world, table=self.key(table), owned=world.owned and not freed)

    def _now(self, world: World) -> float:
        return 11.0 if world.late else 1.0


@dataclass
class Found:
    states: int
    corrupt: list[World]
    spoiled: list[World]
    leaking: list[World]


def explore(
    with_commit: bool = True,
    with_quarantine: bool = True,
    shards: int = 1,
    with_all: bool = True,
    with_verdict: bool = True,
) -> Found:
    """All reachable states: how many, which decode bad KV, which let a late write corrupt another request, and from
    which the blocks of either side can never be freed."""
    model = Model(with_commit, with_quarantine, shards, with_all, with_verdict)
    first = model.first()
    observed = {first}
    parents: dict[World, list[World]] = {}
    queue = deque([first])
    while queue:
        world = queue.popleft()
        for after in model.successors(world):
            parents.setdefault(after, []).append(world)
            if after not in observed:
                observed.add(after)
                queue.append(after)
        assert len(observed) < 2_000_000
    corrupt = [w for w in observed if w.state.phase is Phase.DECODING and (w.dirty or w.unread)]
    free = {w for w in observed if not w.owned and (not w.target_held or w.state.phase is Phase.DECODING)}
    stack = list(free)
    while stack:
        for before in parents.get(stack.pop(), ()):
            if before not in free:
                free.add(before)
                stack.append(before)
    return Found(len(observed), corrupt, [w for w in observed if w.spoiled], [w for w in observed if w not in free])


@pytest.mark.parametrize("shards", [1, 2])
def test_no_interleaving_decodes_bad_kv_or_spoils_or_leaks(shards: int) -> None:
    found = explore(shards=shards)
    assert found.states > 3000 * shards, "the model explores too little to mean anything"
    assert found.corrupt == []
    assert found.spoiled == []
    assert found.leaking == []


def test_the_check_catches_a_protocol_without_commit() -> None:
    assert explore(with_commit=False).corrupt, "a model that cannot fail checks nothing"


def test_the_check_catches_a_protocol_without_quarantine() -> None:
    assert explore(with_quarantine=False).spoiled, "a model that cannot fail checks nothing"


def test_the_check_catches_rumours_that_free_blocks_without_ending_the_lease() -> None:
    assert explore(with_verdict=False).corrupt, "a model that cannot fail checks nothing"


def test_the_check_catches_a_read_of_one_shard_that_counts_for_all() -> None:
    assert explore(shards=2, with_all=False).corrupt, "a model that cannot fail checks nothing"


if __name__ == "__main__":
    tried: list[dict[str, Any]] = [{}, {"with_commit": False}, {"with_quarantine": False}, {"with_verdict": False}]
    tried += [{"shards": 2}, {"shards": 2, "with_commit": False}, {"shards": 2, "with_quarantine": False}]
    for options in [*tried, {"shards": 2, "with_all": False}]:
        result = explore(**options)
        print(
            f"{options or 'the protocol'}: {result.states} states, {len(result.corrupt)} decode bad KV, "
            f"{len(result.spoiled)} spoil another request, {len(result.leaking)} leak"
        )
