"""Scheduling: which tokens are computed next. It handles only ids; the runner computes.

One iteration model (as in vLLM V1): a step gives each chosen sequence some of its missing tokens. Decode, chunked
prefill, recomputation after preemption and a handed-over sequence are the same case.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import repeat

from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.ipc.messages import Books, Failed, Held, Logprobs, Progress, Token, Withdrawn
from pdctl.engine.schedule.sequence import Sequence, Status


@dataclass(frozen=True, slots=True)
class Limits:
    """Budgets of one engine. `max_leased_blocks`: held prefills wait if they would exceed this."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    eos_token_ids: frozenset[int]
    max_leased_blocks: int = 2**31


@dataclass(frozen=True, slots=True)
class Slice:
    """`count` tokens of `sequence` from `start` on; `samples` when the last of them yields a new token."""

    sequence: Sequence
    start: int
    count: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """The results of a step, for the front."""

    tokens: list[Token] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    withdrawn: list[Withdrawn] = field(default_factory=list)


class Scheduler:
    """Admission, chunking, preemption and block counts of one engine."""

    def __init__(self, limits: Limits, allocator: BlockAllocator) -> None:
        self.limits = limits
        self.allocator = allocator
        self.sequences: dict[str, Sequence] = {}
        self.running: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()
        self._incoming: deque[Sequence] = deque()
        self._arrivals = 0
        self._awaiting_kv = 0
        # Number of running pulls per request. Pulls start in another thread than the one that handles their end, so
        # the next pull of a sequence may start before the end of the last one is known here.
        self._pulling: dict[str, int] = {}
        self._pulling_lock = threading.Lock()
        self._doomed: set[str] = set()
        self._withdrawn: list[Withdrawn] = []

    # -- events --------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> Failed | None:
        """Queue a new sequence; Failed if it can never fit."""
        longest = min(sequence.prompt_len + sequence.sampling.max_tokens, self.limits.max_model_len)
        needed = self._blocks_for(max(longest, len(sequence.token_ids), sequence.kv_tokens))
        if needed > self.allocator.num_blocks:
            self.abort(sequence.request_id)
            reason = f"needs {needed} KV blocks and the engine has {self.allocator.num_blocks}"
            return Failed(sequence.request_id, f"{reason}; raise kv_cache_gb or lower max_tokens")
        if sequence.request_id in self.sequences:
            self._fill(self.sequences[sequence.request_id], sequence)
            return None
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self.sequences[sequence.request_id] = sequence
        (self._incoming if sequence.status is Status.AWAITING_BLOCKS else self._waiting).append(sequence)
        return None

    def _fill(self, reserved: Sequence, request: Sequence) -> None:
        """The request for reserved blocks has arrived."""
        assert reserved.status in (Status.AWAITING_BLOCKS, Status.AWAITING_KV)
        assert reserved.kv_tokens == request.kv_tokens
        reserved.token_ids = request.token_ids
        reserved.prompt_len = request.prompt_len
        reserved.sampling = request.sampling
        reserved.guide = request.guide

    def reserve(self) -> list[Sequence]:
        """Reserve blocks for hand-overs in order of arrival, as long as they fit."""
        reserved: list[Sequence] = []
        if self._waiting and self._waiting[0].preempted:
            # It needs all its blocks at once and came first: later ones must not take them one by one.
            return reserved
        while self._incoming and self._has_seat and self._allocate(self._incoming[0], self._incoming[0].kv_tokens):
            sequence = self._incoming.popleft()
            sequence.status = Status.AWAITING_KV
            self._awaiting_kv += 1
            reserved.append(sequence)
        return reserved

    def pull_started(self, request_id: str) -> bool:
        """Record that a transfer writes to this sequence's blocks; False if the sequence is already gone."""
        with self._pulling_lock:
            sequence = self.sequences.get(request_id)
            if sequence is None or sequence.status is not Status.AWAITING_KV:
                return False
            self._pulling[request_id] = self._pulling.get(request_id, 0) + 1
        return True

    def pull_ended(self, request_id: str, uncertain: bool = False) -> None:
        """A pull is over; an abort that waited for this takes effect. `uncertain`: the transfer may still write to the
        blocks, so they are not reused before `pull_settled`."""
        with self._pulling_lock:
            left = self._pulling.pop(request_id) - 1
            if left:
                self._pulling[request_id] = left
        assert not (uncertain and left), "a piece was pulled although the one before it failed"
        if uncertain:
            self._doomed.discard(request_id)
            sequence = self.sequences[request_id]
            self.allocator.quarantine(request_id)
            sequence.block_ids.clear()
            self._forget(sequence)
        elif request_id in self._doomed and not left:
            self._doomed.discard(request_id)
            self._forget(self.sequences[request_id])

    def pull_settled(self, request_id: str) -> None:
        """Free the quarantined blocks: nothing writes to them any more."""
        self.allocator.settle(request_id)

    def start(self, request_id: str) -> bool:
        """The pulled KV is committed: the sequence starts decoding."""
        sequence = self.sequences.get(request_id)
        if sequence is None or sequence.status is not Status.AWAITING_KV or request_id in self._doomed:
            return False
        assert request_id not in self._pulling
        assert sequence.token_ids, "decoding begins before the request came"
        sequence.num_computed = sequence.kv_tokens
        sequence.status = Status.RUNNING
        self._awaiting_kv -= 1
        self.running.append(sequence)
        return True

    def abort(self, request_id: str) -> None:
        """Abort a sequence in any state. Blocks being written to are freed when the pull has ended."""
        sequence = self.sequences.get(request_id)
        if sequence is None:
            return
        with self._pulling_lock:
            if request_id in self._pulling:
                self._doomed.add(request_id)
                return
            self._forget(sequence)

    # -- a step --------------------------------------------------------------------------------------------

    def schedule(self) -> list[Slice]:
        """Choose the next step's tokens: running sequences oldest first, then waiting ones in order."""
        batch: list[Slice] = []
        budget = self.limits.max_num_batched_tokens
        preempted = False
        # Decodes (one missing token) come before chunks of long prompts, so that running streams are not delayed.
        for sequence in sorted(self.running, key=lambda sequence: sequence.num_missing > 1):
            if budget == 0 or sequence.status is not Status.RUNNING:
                continue
            count = min(sequence.max_chunk, budget)
            while not self._allocate(sequence, sequence.num_computed + count):
                preempted = True
                victim = self._victim()
                self._preempt(victim)
                batch = [piece for piece in batch if piece.sequence is not victim]
                if victim is sequence:
                    break
            if sequence.status is Status.RUNNING:
                batch.append(self._slice(sequence, count))
                budget -= count
        if not preempted:
            self._admit(batch, budget)
        return batch

    def update(
        self, batch: list[Slice], token_ids: list[int], logprobs: Iterable[Logprobs | None] = repeat(None)
    ) -> Outcome:
        """Apply the step's results: one token id per sampling slice, in order, with its log probabilities."""
        outcome = Outcome(withdrawn=self._withdrawn)
        self._withdrawn = []
        sampled = zip(token_ids, logprobs, strict=False)
        for piece in batch:
            sequence = piece.sequence
            sequence.num_computed += piece.count
            if piece.samples:
                self._append(sequence, *next(sampled), outcome)
            elif sequence.offer:
                sequence.offered = True
                blocks = list(sequence.block_ids)
                outcome.progress.append(Progress(sequence.request_id, blocks, sequence.num_computed))
        return outcome

    def books(self, steps: int) -> Books:
        """The counts for the front and for display."""
        leased = reserved = 0
        for sequence in self.sequences.values():
            if sequence.status is Status.HELD:
                leased += len(sequence.block_ids)
            elif sequence.status is Status.AWAITING_KV:
                reserved += len(sequence.block_ids)
        free, quarantined = self.allocator.num_free, self.allocator.num_quarantined
        return Books(
            blocks_free=free,
            blocks_referenced=self.allocator.num_blocks - free - quarantined - leased,
            blocks_leased=leased,
            blocks_quarantined=quarantined,
            blocks_reserved=reserved,
            held_back=len(self._waiting) - len(self._admissible()),
            running=len(self.running),
            waiting=len(self._waiting) + len(self._incoming),
            steps=steps,
        )

    @property
    def has_work(self) -> bool:
        """Whether a step could compute anything."""
        return bool(self.running or self._admissible())

    def audit(self) -> None:
        """Check that every block is free or belongs to a known sequence, and every sequence is in the queue of its
        status."""
        self.allocator.audit()
        owned = sum(len(sequence.block_ids) for sequence in self.sequences.values())
        idle = self.allocator.num_free + self.allocator.num_quarantined
        assert owned + idle == self.allocator.num_blocks, "blocks without a sequence"
        queued = {
            Status.RUNNING: set(map(id, self.running)),
            Status.WAITING: set(map(id, self._waiting)),
            Status.AWAITING_BLOCKS: set(map(id, self._incoming)),
        }
        for sequence in self.sequences.values():
            for status, members in queued.items():
                assert (id(sequence) in members) == (sequence.status is status), f"{sequence.request_id}: {status}"
            assert sequence.num_computed <= len(sequence.block_ids) * self.limits.block_size
        assert len(self.running) + self._awaiting_kv <= self.limits.max_num_seqs

    # -- parts ---------------------------------------------------------------------------------------------

    def _admit(self, batch: list[Slice], budget: int) -> None:
        """Admit waiting sequences in order. Held prefills that would exceed the lease limit are skipped."""
        for sequence in self._admissible():
            if budget == 0 or not self._has_seat:
                return
            # Allocate all blocks at once: the chunks of a prompt are then contiguous, and two partly admitted prompts
            # cannot starve each other.
            if not self._allocate(sequence, len(sequence.token_ids)):
                return
            self._waiting.remove(sequence)
            sequence.status = Status.RUNNING
            self.running.append(sequence)
            count = min(sequence.max_chunk, budget)
            batch.append(self._slice(sequence, count))
            budget -= count

    def _admissible(self) -> list[Sequence]:
        """Waiting sequences that can be admitted together without exceeding the limit of leased blocks. A single
        prefill is always admissible."""
        pinned = sum(len(sequence.block_ids) for sequence in self.sequences.values() if sequence.hold)
        found = []
        for sequence in self._waiting:
            wanted = self._blocks_for(len(sequence.token_ids)) if sequence.hold else 0
            if wanted and pinned and pinned + wanted > self.limits.max_leased_blocks:
                continue
            pinned += wanted
            found.append(sequence)
        return found

    def _slice(self, sequence: Sequence, count: int) -> Slice:
        return Slice(sequence, sequence.num_computed, count, count == sequence.num_missing)

    def _append(self, sequence: Sequence, token_id: int, told: Logprobs | None, outcome: Outcome) -> None:
        prompt = sequence.take_prompt_logprobs()
        sequence.token_ids.append(token_id)
        reason = self._finish_reason(sequence, token_id)
        if sequence.hold and reason is None:
            sequence.status = Status.HELD
            self.running.remove(sequence)
            outcome.held.append(
                Held(sequence.request_id, token_id, list(sequence.block_ids), len(sequence.token_ids) - 1, told, prompt)
            )
            return
        outcome.tokens.append(Token(sequence.request_id, token_id, reason, told, prompt))
        if reason is not None:
            self._forget(sequence)

    def _finish_reason(self, sequence: Sequence, token_id: int) -> str | None:
        if token_id in self.limits.eos_token_ids and not sequence.sampling.ignore_eos:
            return "stop"
        if token_id in sequence.sampling.stop_token_ids and sequence.num_output > sequence.sampling.min_tokens:
            return "stop"
        full = len(sequence.token_ids) >= self.limits.max_model_len
        # A held prefill of a new prompt never ends by length: routers request one token, and decode continues from it.
        fresh_hold = sequence.hold and sequence.num_output == 1
        if full or (sequence.num_output >= sequence.sampling.max_tokens and not fresh_hold):
            return "length"
        return None

    @property
    def _has_seat(self) -> bool:
        return len(self.running) + self._awaiting_kv < self.limits.max_num_seqs

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.block_size)

    def _allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        missing = self._blocks_for(num_tokens) - len(sequence.block_ids)
        if missing <= 0:
            return True
        taken = self.allocator.allocate(sequence.request_id, missing)
        if taken is None:
            return False
        sequence.block_ids.extend(taken)
        return True

    def _victim(self) -> Sequence:
        """The newest running sequence: it has the least to lose and the oldest always finishes."""
        return max(self.running, key=lambda sequence: sequence.arrival)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.allocator.free(sequence.request_id)
        sequence.block_ids.clear()
        sequence.num_computed = 0
        sequence.preempted = True
        if sequence.offered:
            sequence.offered = sequence.offer = False
            self._withdrawn.append(Withdrawn(sequence.request_id))
        sequence.status = Status.WAITING
        self._waiting.appendleft(sequence)

    def _forget(self, sequence: Sequence) -> None:
        del self.sequences[sequence.request_id]
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self._waiting.remove(sequence)
        elif sequence.status is Status.AWAITING_BLOCKS:
            self._incoming.remove(sequence)
        elif sequence.status is Status.AWAITING_KV:
            self._awaiting_kv -= 1
        self.allocator.free(sequence.request_id)
