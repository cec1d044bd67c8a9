"""Which prompts a step computes: waiting ones and partial ones compete again in every step, in the order of the policy.

A prompt gets all its blocks at once when it is admitted, and keeps them while another one passes it. Chunks end at
borders of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from pdctl.engine.schedule.batch import Batch, Limits
from pdctl.engine.schedule.prompts.policies import POLICIES, Prompt
from pdctl.engine.schedule.prompts.share import LONGEST_WAIT_S, OverdueShare
from pdctl.engine.schedule.prompts.waiting import Order, Rank, WaitingQueue
from pdctl.engine.schedule.room import Room
from pdctl.engine.schedule.running import Running
from pdctl.engine.schedule.sequence import Sequence, Status

# Prompts computed in part. More of them would hold blocks without getting done sooner.
_MAX_PARTIAL = 4
# After so many passes by others a partial prompt is not passed any more, but by those of a lower priority number.
_MAX_PASSES = 4

# Predicted seconds for (tokens to compute, tokens before them).
Work = Callable[[int, int], float]
# Preempts a sequence that may be part of the batch.
Preempt = Callable[[Sequence, Batch], None]


class Prefills:
    """The waiting prompts of one engine, and the choice among them and the partial ones."""

    def __init__(self, limits: Limits, room: Room, running: Running, work: Work) -> None:
        self._limits = limits
        self._room = room
        self._running = running
        self._policy = POLICIES[limits.policy]
        self._work = work
        # Prefills for peers wait apart: at the limit of leased blocks the others go on.
        self._for_peers = WaitingQueue(self._policy)
        self._own = WaitingQueue(self._policy)
        self._share = OverdueShare()
        self._num_preempted = 0
        # Tokens of what waits; those that will be found in the cache are not known yet.
        self.tokens = 0
        # Prompts admitted so far that are not for peers.
        self.own = 0

    def __len__(self) -> int:
        return len(self._for_peers) + len(self._own)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._for_peers
        yield from self._own

    @property
    def has_preempted(self) -> bool:
        """Whether a preempted sequence waits for its blocks."""
        return self._num_preempted > 0

    @property
    def has_seat(self) -> bool:
        """Whether one more sequence may have blocks."""
        return len(self._running) + self._room.expected < self._limits.max_num_seqs

    def queue(self, sequence: Sequence) -> None:
        """Queue a sequence without blocks."""
        self._num_preempted += bool(sequence.preemptions)
        self.tokens += len(sequence.token_ids)
        self._queue_of(sequence).push(sequence, self._prompt(sequence))

    def remove(self, sequence: Sequence) -> None:
        """Take a waiting sequence out."""
        self._num_preempted -= bool(sequence.preemptions)
        self.tokens -= len(sequence.token_ids)
        self._queue_of(sequence).remove(sequence)

    def head(self, now: float) -> Sequence | None:
        """The waiting sequence that goes first among those that may start."""
        own, peers = self._own.head(now), self._for_peers.head(now)
        heads = [] if own is None else [own]
        if peers is not None and self._room.allows_lease(peers):
            heads.append(peers)
        overdue = self._overdue(now)
        if overdue is not None:
            heads.append(overdue)
        return min(heads, key=lambda sequence: (self._standing(sequence, now), sequence.arrival), default=None)

    def held_back(self, now: float) -> int:
        """The number of prefills for peers that wait for leased blocks to be freed."""
        first = self._for_peers.head(now)
        return 0 if first is None or self._room.allows_lease(first) else len(self._for_peers)

    def fill(self, batch: Batch, now: float, preempt: Preempt | None) -> None:
        """Give the rest of the budget to prompts. Without `preempt`, blocks are short: nothing is admitted."""
        before = list(self._running.partial.values())
        partial = sorted(before, key=lambda sequence: (self._order(sequence, now), sequence.arrival))
        while batch.budget:
            newcomer = self.head(now) if preempt is not None and self.has_seat else None
            if newcomer is not None and (not partial or self._passes(newcomer, partial[0], now)):
                assert preempt is not None
                if self._admit(newcomer, batch, partial, now, preempt):
                    continue
                preempt = None
            elif partial:
                first = partial.pop(0)
                self._compute(first, batch, first.out_of_turn or self._order(first, now)[0] is Rank.OVERDUE)
            else:
                break
        for sequence in before:
            sequence.passes += sequence.was_computed and sequence not in batch
            sequence.was_computed = sequence in batch

    def audit(self) -> None:
        """Check the counts of preempted sequences and tokens, and that the queues hold only what waits."""
        assert self._num_preempted == sum(bool(sequence.preemptions) for sequence in self)
        assert self.tokens == sum(len(sequence.token_ids) for sequence in self)
        assert all(sequence.status is Status.WAITING and not sequence.block_ids for sequence in self)

    def _admit(self, sequence: Sequence, batch: Batch, partial: list[Sequence], now: float, preempt: Preempt) -> bool:
        """Give a waiting sequence all its blocks and its first chunk. A partial prompt that goes after it may lose its
        blocks for it; so the first in order never waits for what later ones hold."""
        # At least one token is computed: its logits give the next one.
        sequence.num_computed = self._room.attach(sequence, len(sequence.token_ids) - 1)
        chunk = self._chunk(sequence, batch.budget)
        fits = chunk > 0 and (
            chunk == sequence.num_missing or len(self._running.partial) - batch.num_ending < _MAX_PARTIAL
        )
        if not fits or not self._has_blocks(sequence, batch, partial, now, preempt):
            self._room.release(sequence)
            sequence.num_computed = 0
            return False
        self._room.looked_for(sequence, sequence.num_computed)
        sequence.out_of_turn = self._standing(sequence, now)[0] is Rank.OVERDUE
        self.remove(sequence)
        self.own += not sequence.hold and not sequence.preemptions
        sequence.status = Status.RUNNING
        sequence.was_computed = True
        self._running.put(sequence)
        self._compute(sequence, batch, sequence.out_of_turn)
        return True

    def _compute(self, sequence: Sequence, batch: Batch, out_of_turn: bool) -> None:
        chunk = self._chunk(sequence, batch.budget)
        if chunk:
            batch.add(sequence, chunk)
            self._share.spend(chunk, out_of_turn)

    def _has_blocks(
        self, sequence: Sequence, batch: Batch, partial: list[Sequence], now: float, preempt: Preempt
    ) -> bool:
        while not self._room.grow(sequence, len(sequence.token_ids), keep_spare=len(self._running) > 0):
            if not partial or not self._may_take(sequence, partial[-1], now):
                return False
            preempt(partial.pop(), batch)
        return True

    def _may_take(self, sequence: Sequence, holder: Sequence, now: float) -> bool:
        once = not holder.preemptions and not sequence.preemptions
        return once and self._passes(sequence, holder, now)

    def _passes(self, newcomer: Sequence, current: Sequence, now: float) -> bool:
        """Whether a waiting sequence goes before a partial one: only if it gains more than a step takes."""
        order, other = self._standing(newcomer, now), self._order(current, now)
        if order[:2] != other[:2]:
            return order[:2] < other[:2]
        return order[2] < other[2] - self._work(self._limits.max_num_batched_tokens, 0)

    def _order(self, sequence: Sequence, now: float) -> Order:
        """The place of a partial prompt, by the work that is left of it."""
        prompt = self._prompt(sequence)
        is_next = sequence.passes >= _MAX_PASSES
        is_overdue = sequence.out_of_turn or (is_next and now >= sequence.arrived_s + LONGEST_WAIT_S)
        rank = Rank.NORMAL
        if sequence.preemptions:
            rank = Rank.URGENT
        elif is_overdue and self._share.is_due:
            rank = Rank.OVERDUE
        elif now > self._policy.late_from(prompt) and not is_next:
            rank = Rank.LATE
        return rank, sequence.priority, -math.inf if is_next else self._policy.key(prompt)

    def _standing(self, sequence: Sequence, now: float) -> Order:
        """The place of a waiting prompt."""
        order = self._queue_of(sequence).order(sequence)
        return (Rank.OVERDUE, 0, 0.0) if order[0] > Rank.OVERDUE and sequence is self._overdue(now) else order

    def _overdue(self, now: float) -> Sequence | None:
        """The prompt that may go out of turn now: the one that has waited longest, if that is too long."""
        if not self._share.is_due:
            return None
        own, peers = self._own.longest_waiting(), self._for_peers.longest_waiting()
        if peers is not None and not self._room.allows_lease(peers):
            peers = None
        waiting = [sequence for sequence in (own, peers) if sequence and now >= sequence.arrived_s + LONGEST_WAIT_S]
        return min(waiting, key=lambda sequence: sequence.arrival, default=None)

    def _prompt(self, sequence: Sequence) -> Prompt:
        work = self._work(sequence.num_missing, sequence.num_computed)
        whole = self._work(len(sequence.token_ids), 0)
        ttft_s = sequence.ttft_s or self._limits.ttft_s
        deadline = sequence.arrived_s + ttft_s if ttft_s else math.inf
        return Prompt(sequence.arrived_s, work, whole, deadline)

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        """Missing tokens to compute in this step. If some are left, the chunk ends at the border of a block, if it
        reaches one. With segments it is a whole one, or the rest of the prompt, or nothing."""
        if size := self._limits.segment:
            whole = min(sequence.max_chunk, size - sequence.num_computed % size)
            return whole if whole <= budget else 0
        count = min(sequence.max_chunk, budget)
        if count < sequence.num_missing:
            beyond = (sequence.num_computed + count) % self._limits.block_size
            count -= beyond if beyond < count else 0
        return count

    def _queue_of(self, sequence: Sequence) -> WaitingQueue:
        return self._for_peers if sequence.hold else self._own
