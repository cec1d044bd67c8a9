"""Every interleaving of one hand-over, over the real lease table and the real migration machine.

The world around them is adversarial: messages are lost, repeated and late, the deadline may pass at any moment, freed
blocks are reused at any moment, and either engine may die and come back. Checked: no state decodes KV that was
overwritten while it was read, and from every state the prefill's blocks can still come free.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pdctl.engine.lease import LeaseTable
from pdctl.engine.migration import Action, Event, Migration, Phase, advance

EPOCHS = ("e0", "e1")
HOLDER = "d"


@dataclass(frozen=True)
class World:
    """`dirty`: blocks were overwritten between the read's begin and now, or were no longer ours when it began."""

    table: tuple[object, ...]
    epoch: int
    p_alive: bool
    owned: bool  # the prefill's blocks are pinned for this request
    reused: bool
    d_alive: bool
    state: Migration
    reading: bool
    dirty: bool
    net: frozenset[tuple[str, int | bool]]
    crashes: int
    late: bool  # the clock is past the deadline


class Model:
    """Successors of a world. `with_commit=False` decodes right after the read, as other systems do."""

    def __init__(self, with_commit: bool) -> None:
        self.with_commit = with_commit
        self.tables: dict[tuple[object, ...], LeaseTable] = {}

    def key(self, table: LeaseTable) -> tuple[object, ...]:
        """What can be told apart from outside, as a hashable."""
        live = tuple((lease.lease_id, lease.state, lease.holder, lease.deadline) for lease in table.live())
        tombs = tuple((k, v.state, v.holder) for k, v in table._tombstones.items())
        found = (table.epoch, live, tombs)
        self.tables.setdefault(found, table)
        return found

    def first(self) -> World:
        table = LeaseTable(EPOCHS[0], 10)
        table.grant("r", 1, 0)
        return World(self.key(table), 0, True, True, False, True, Migration(), False, False,
                     frozenset({("ticket", 0)}), 0, False)  # fmt: skip

    def successors(self, world: World) -> Iterator[World]:
        yield from self._environment(world)
        for message in world.net:
            yield replace(world, net=world.net - {message})  # lost
            yield from self._delivered(world, *message)  # and may be delivered again: it stays in the net
        if world.d_alive:
            yield from self._decode_side(world)

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
            yield replace(world, reused=True, dirty=world.dirty or world.reading)
        if world.crashes == 0 and world.p_alive:
            yield replace(world, p_alive=False, owned=False, crashes=1, dirty=world.dirty or world.reading)
        if not world.p_alive:
            fresh = LeaseTable(EPOCHS[1], 10)
            yield replace(world, p_alive=True, epoch=1, table=self.key(fresh), reused=True)
        if world.crashes == 0 and world.d_alive:
            died = replace(world, d_alive=False, crashes=1, reading=False)
            yield died
            # the supervisor saw it
            moved = copy.deepcopy(table)
            freed = any(verdict.freed for verdict in moved.release_holder(HOLDER))
            yield self._after_table(died, moved, freed)

    # -- messages --

    def _delivered(self, world: World, kind: str, value: int | bool) -> Iterator[World]:
        if kind in ("claim", "commit", "release") and world.p_alive:
            table = copy.deepcopy(self.tables[world.table])
            lease, epoch, now = f"{EPOCHS[0]}.1", EPOCHS[value], self._now(world)
            if kind == "release":
                verdict = table.release(lease, epoch, now)
                yield self._after_table(world, table, verdict.freed is not None)
                return
            call = table.claim if kind == "claim" else table.commit
            verdict = call(lease, epoch, HOLDER, now)
            after = self._after_table(world, table, verdict.freed is not None)
            yield replace(after, net=after.net | {(f"{kind}_answer", verdict.ok)})
        elif kind == "claim_answer" and world.d_alive:
            yield self._advance(world, Event.CLAIM_OK if value else Event.CLAIM_REFUSED)
        elif kind == "commit_answer" and world.d_alive:
            yield self._advance(world, Event.COMMIT_OK if value else Event.COMMIT_REFUSED)
        elif kind == "ticket" and world.d_alive and world.state == Migration():
            yield replace(world, net=world.net | {("claim", 0)})

    # -- the decode engine --

    def _decode_side(self, world: World) -> Iterator[World]:
        phase = world.state.phase
        if phase is Phase.QUEUED:
            if not world.state.reserved:
                yield self._advance(world, Event.RESERVED)
            yield self._advance(world, Event.DEADLINE)
            yield self._advance(world, Event.CANCELLED)
        if phase is Phase.READING:
            done = replace(world, reading=False)
            if self.with_commit:
                yield self._advance(done, Event.READ_OK)
            else:
                yield replace(done, state=replace(world.state, phase=Phase.DECODING))
            yield self._advance(done, Event.READ_FAILED)
            yield self._advance(done, Event.CANCELLED)
        if phase is Phase.COMMITTING:
            yield self._advance(world, Event.COMMIT_UNANSWERED)
            yield self._advance(world, Event.CANCELLED)

    def _advance(self, world: World, event: Event) -> World:
        state, actions = advance(world.state, event)
        world = replace(world, state=state)
        for action in actions:
            if action is Action.READ:
                stale = not (world.owned and world.epoch == 0 and world.p_alive) and world.reused
                world = replace(world, reading=True, dirty=stale)
            elif action is Action.COMMIT:
                world = replace(world, net=world.net | {("commit", 0)})
            elif action is Action.RELEASE_LEASE:
                world = replace(world, net=world.net | {("release", 0)})
        return world

    def _after_table(self, world: World, table: LeaseTable, freed: bool) -> World:
        return replace(world, table=self.key(table), owned=world.owned and not freed)

    def _now(self, world: World) -> float:
        return 11.0 if world.late else 1.0


def explore(with_commit: bool) -> tuple[int, list[World], list[World]]:
    """(states, states that decode overwritten KV, states from which the blocks can never come free)."""
    model = Model(with_commit)
    first = model.first()
    seen = {first}
    parents: dict[World, set[World]] = {}
    queue = deque([first])
    while queue:
        world = queue.popleft()
        for after in model.successors(world):
            parents.setdefault(after, set()).add(world)
            if after not in seen:
                seen.add(after)
                queue.append(after)
        assert len(seen) < 500_000
    corrupt = [w for w in seen if w.state.phase is Phase.DECODING and w.dirty]
    reclaimable = {w for w in seen if not w.owned}
    stack = list(reclaimable)
    while stack:
        for before in parents.get(stack.pop(), ()):
            if before not in reclaimable:
                reclaimable.add(before)
                stack.append(before)
    return len(seen), corrupt, [w for w in seen if w not in reclaimable]


def test_no_interleaving_decodes_overwritten_kv_or_leaks() -> None:
    states, corrupt, leaking = explore(with_commit=True)
    assert states > 300, "the model explores too little to mean anything"
    assert corrupt == []
    assert leaking == []


def test_the_check_catches_a_protocol_without_commit() -> None:
    _, corrupt, _ = explore(with_commit=False)
    assert corrupt, "a model that cannot fail checks nothing"
