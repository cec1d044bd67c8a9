"""Scheduling: which tokens are computed next. It handles only ids; the runner computes.

One iteration model (as in vLLM V1): a step gives each chosen sequence some of its missing tokens. Decode, chunked
prefill, recomputation after preemption and a handed-over sequence are the same case. A step costs time in proportion to
what it changes: what waits is in heaps, and counts are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import repeat

from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.ipc.messages import (
    Books,
    Failed,
    Found,
    Held,
    KvChange,
    Logprobs,
    Progress,
    Token,
    Withdrawn,
)
from pdctl.engine.schedule.ahead import Ahead
from pdctl.engine.schedule.batch import Batch, Limits, Outcome, Slice, launched
from pdctl.engine.schedule.drafts import Drafts, Sampled, accepted
from pdctl.engine.schedule.endings import finish_reason
from pdctl.engine.schedule.inline import prompt_tokens
from pdctl.engine.schedule.latency import LatencyModel
from pdctl.engine.schedule.peers import lending, moves
from pdctl.engine.schedule.peers.kv_journal import KvJournal
from pdctl.engine.schedule.peers.pulls import Pulls
from pdctl.engine.schedule.prompts.prefills import Prefills
from pdctl.engine.schedule.room import Room
from pdctl.engine.schedule.running import Running
from pdctl.engine.schedule.sequence import Pace, Sequence, Status
from pdctl.speculative import Speculative

# A sequence that was preempted so often is spared as long as there is another one.
_MAX_PREEMPTIONS = 4
# After a hand-over, more are expected for so many seconds.
_ARRIVALS_S = 60.0


class Scheduler:
    """Admission, chunking, preemption and block counts of one engine. `latency`: predicts steps, by default from those
    so far; `clock`: monotonic seconds, by default of a clock that stands still; `root`: the beginning of the names of
    blocks, None: no block is shared; `journal`: gets what others can find; `speculative`: None: no token is
    guessed."""

    def __init__(
        self,
        limits: Limits,
        allocator: BlockAllocator,
        latency: LatencyModel | None = None,
        clock: Callable[[], float] = lambda: 0.0,
        root: bytes | None = None,
        journal: KvJournal | None = None,
        speculative: Speculative | None = None,
    ) -> None:
        self.limits = limits
        self.allocator = allocator
        self.sequences: dict[str, Sequence] = {}
        self.running = Running()
        self._clock = clock
        self._room = Room(limits, allocator, root, journal)
        self._journal = journal
        self.latency = latency or LatencyModel()
        self._prefills = Prefills(limits, self._room, self.running, self._work)
        self._drafts = Drafts(limits, self._room, speculative)
        self.ahead = Ahead(limits, self._room, self.running, self._prefills, speculative is not None)
        self._incoming: dict[str, Sequence] = {}
        self._arrivals = 0
        self._received = 0
        # The target of the newest sequence that a peer handed over, and when it came.
        self._arriving = (0.0, -math.inf)
        self.pulls = Pulls()
        self._withdrawn: list[Withdrawn] = []

    # -- events --------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> Failed | None:
        """Queue a new sequence; Failed if it can never fit."""
        longest = min(sequence.prompt_len + sequence.sampling.max_tokens, self.limits.max_model_len)
        needed = self._room.blocks_for(max(longest, len(sequence.token_ids), sequence.kv_tokens))
        if needed > self.allocator.num_blocks:
            self.abort(sequence.request_id)
            there = self.allocator.num_blocks
            reason = f"needs {needed} KV blocks and the engine has {there}"
            mend = f"raise kv_cache_gb at least {-(-needed // there)} times (with more devices: pipeline_parallel)"
            return Failed(sequence.request_id, f"{reason}; {mend}, or lower max_tokens")
        if sequence.request_id in self.sequences:
            return self._fill(self.sequences[sequence.request_id], sequence)
        self._arrivals += 1
        sequence.arrival = self._arrivals
        sequence.arrived_s = self._clock()
        self.sequences[sequence.request_id] = sequence
        if sequence.status is Status.AWAITING_BLOCKS:
            self._incoming[sequence.request_id] = sequence
        else:
            self._prefills.queue(sequence)
        return None

    def _fill(self, reserved: Sequence, request: Sequence) -> Failed | None:
        """The request for reserved blocks has arrived. Failed if they were reserved for other tokens: blocks that were
        found here would hold another prompt's KV, or another tenant's."""
        if reserved.status is Status.ENDED:
            return Failed(request.request_id, "a request with this id is still being computed")
        assert reserved.status in (Status.AWAITING_BLOCKS, Status.AWAITING_KV)
        assert reserved.kv_tokens == request.kv_tokens
        known = request.token_ids[: request.kv_tokens], request.salt
        if reserved.block_names and (reserved.token_ids, reserved.salt) != known:
            self.abort(request.request_id)
            return Failed(request.request_id, "its KV was offered as that of other tokens")
        reserved.token_ids = request.token_ids
        reserved.prompt_len = request.prompt_len
        reserved.sampling = request.sampling
        reserved.guide = request.guide
        reserved.priority = request.priority
        reserved.tpot_s = request.tpot_s
        reserved.kv_segment = request.kv_segment
        # What is pulled gets its names at the commit, so with this salt.
        reserved.salt = request.salt
        return None

    def reserve(self) -> list[Sequence]:
        """Reserve blocks for hand-overs in order of arrival, as long as they fit."""
        reserved: list[Sequence] = []
        while self._incoming and not self._prefills.has_preempted and self._prefills.has_seat:
            # A preempted one needs all its blocks at once and came first: these must not take them one by one.
            sequence = next(iter(self._incoming.values()))
            # Of a hand-over whose request is not here yet, the tokens may be unknown.
            found = self._room.attach(sequence, sequence.kv_tokens) if sequence.token_ids else 0
            if not self._room.grow(sequence, sequence.kv_tokens):
                self._room.release(sequence)
                break
            sequence.num_cached = found
            del self._incoming[sequence.request_id]
            self._room.become(sequence, Status.AWAITING_KV)
            reserved.append(sequence)
        return reserved

    def pull_started(self, request_id: str) -> bool:
        """Record that a transfer writes to this sequence's blocks; False if the sequence is already gone."""

        def is_waiting() -> bool:
            sequence = self.sequences.get(request_id)
            return sequence is not None and sequence.status is Status.AWAITING_KV

        return self.pulls.start(request_id, is_waiting)

    def pull_wanted(self, request_id: str) -> bool:
        """Whether the sequence still waits for what is being pulled."""
        return not self.pulls.is_doomed(request_id)

    def pull_ended(self, request_id: str, uncertain: bool = False) -> None:
        """A pull is over; an abort that waited for this takes effect. `uncertain`: the transfer may still write to the
        blocks, so they are not reused before `pull_settled`."""
        left = self.pulls.end(request_id)
        assert not (uncertain and left), "a piece was pulled although the one before it failed"
        if left:
            return
        doomed = self.pulls.settle(request_id)
        if uncertain:
            self._room.quarantine(self.sequences[request_id])
        if uncertain or doomed:
            self._forget(self.sequences[request_id])

    def pull_settled(self, request_id: str) -> None:
        """Free the quarantined blocks: nothing writes to them any more."""
        self.allocator.settle(request_id)

    def start(self, request_id: str) -> bool:
        """The pulled KV is committed: the sequence starts decoding."""
        sequence = self.sequences.get(request_id)
        if sequence is None or sequence.status is not Status.AWAITING_KV or self.pulls.is_doomed(request_id):
            return False
        assert request_id not in self.pulls.running
        assert sequence.prompt_len, "decoding begins before the request came"
        self._received += 1
        self._arriving = (sequence.tpot_s, self._clock())
        self._room.become(sequence, Status.RUNNING)
        self._room.pulled(sequence)
        self.running.put(sequence)
        return True

    def keep(self, request_id: str, kv_segment: int, kv_tokens: int | None = None) -> None:
        """The pulled KV is committed, and stays for whoever asks for it next; its sequence ends. `kv_tokens`: see
        Keep."""
        sequence = self.sequences.get(request_id)
        if sequence is None or sequence.status is not Status.AWAITING_KV or self.pulls.is_doomed(request_id):
            return
        assert request_id not in self.pulls.running
        sequence.kv_segment = kv_segment
        if kv_tokens is not None:
            sequence.kv_tokens = min(sequence.kv_tokens, kv_tokens)
        self._room.pulled(sequence)
        self._forget(sequence)

    def has_room(self, num_tokens: int) -> bool:
        """Whether blocks for KV from a peer could be reserved at once."""
        is_first = not self._incoming and not self._prefills.has_preempted and self._prefills.has_seat
        return is_first and self._room.has(num_tokens)

    def find(self, request_id: str, token_ids: list[int], salt: str) -> Found:
        """Hold the KV of a prompt's first tokens for a peer, until an abort: see lending."""
        held = lending.held(request_id, token_ids, salt, self._room) if request_id not in self.sequences else None
        if held is None:
            return Found(request_id, [], 0)
        self.sequences[request_id] = held
        return Found(request_id, list(held.block_ids), held.num_computed)

    def move(self, request_id: str, offer: bool) -> None:
        """Hold a sequence for a peer, if it decodes: see moves."""
        if (sequence := self.sequences.get(request_id)) is not None:
            moves.begin(sequence, offer, self.limits.max_model_len, self._room)

    def abort(self, request_id: str) -> None:
        """Abort a sequence in any state. Blocks being written to are freed when the pull has ended."""
        sequence = self.sequences.get(request_id)
        if sequence is None:
            return
        self.pulls.abort(request_id, lambda: self._forget(sequence))

    # -- a step --------------------------------------------------------------------------------------------

    def schedule(self) -> list[Slice]:
        """Choose the next step's tokens: first one for each sequence that decodes, so that running streams are not
        delayed, then prompts in the order of the policy, then guesses of what follows."""
        batch = Batch(self.limits.max_num_batched_tokens)
        has_room = self._decode(batch)
        now = self._clock()
        if self._has_prompts:
            partial, times = self.running.partial.values(), self.latency.times
            tokens = prompt_tokens(batch.slices, partial, times, self.limits, now, self._arriving_tpot_s(now))
            batch.limit(max(tokens, self.limits.segment))
        self._prefills.fill(batch, now, self._preempt if has_room else None)
        self._drafts.fill(batch, self.latency)
        return launched(batch.slices)

    def schedule_ahead(self, batch: list[Slice], is_quiet: bool = True) -> list[Slice]:
        """The step after `batch`, which computes; [] if that depends on its results, or on messages that wait (not
        `is_quiet`)."""
        return launched(self.ahead.following(batch, self._clock(), is_quiet).batch)

    @property
    def _has_prompts(self) -> bool:
        return bool(self.running.partial) or len(self._prefills) > 0

    def _arriving_tpot_s(self, now: float) -> float:
        tpot_s, came_at = self._arriving
        return tpot_s if now - came_at < _ARRIVALS_S else 0.0

    def _decode(self, batch: Batch) -> bool:
        """Add what decodes. False if sequences had to be preempted for it."""
        has_room = True
        for sequence in list(self.running.decoding.values()):
            if batch.budget == 0:
                break
            while sequence in self.running and not self._room.grow(sequence, sequence.num_computed + 1):
                has_room = False
                self._preempt(self._victim(), batch)
            if sequence in self.running:
                batch.add(sequence, 1)
        return has_room

    def took(self, batch: list[Slice], seconds: float) -> None:
        """Note how long a step has taken, to predict the next ones."""
        self.latency.note(batch, seconds)

    def update(
        self, batch: list[Slice], token_ids: list[int], logprobs: Iterable[Logprobs | None] = repeat(None)
    ) -> Outcome:
        """Apply the step's results: for each sampling slice, in order, a token id and one more per draft, with their
        log probabilities."""
        outcome = Outcome(withdrawn=self._withdrawn)
        self._withdrawn = []
        sampled = iter(zip(token_ids, logprobs, strict=False))
        for piece in batch:
            sequence = piece.sequence
            found = [next(sampled) for _ in range(piece.num_sampled)]
            sequence.in_flight -= 1
            if sequence.status is Status.ENDED:
                self._forget(sequence)
                continue
            self._room.computed(sequence, piece.count)
            if piece.samples:
                self._take(piece, found, outcome)
            if sequence.status is not Status.RUNNING or sequence.request_id not in self.sequences:
                continue
            self.running.put(sequence)
            # Of a sequence that decodes, the rest follows at once when it is held.
            if sequence.offer and not (piece.samples and sequence.offered):
                sequence.offered = True
                blocks, computed = list(sequence.block_ids), sequence.num_computed
                outcome.progress.append(Progress(sequence.request_id, blocks, computed, sequence.hold_at))
        return outcome

    def books(self, steps: int) -> Books:
        """The counts for the front and for display."""
        free, quarantined, leased = self.allocator.num_free, self.allocator.num_quarantined, self._room.leased
        return Books(
            blocks_free=free,
            blocks_referenced=self.allocator.num_blocks - free - quarantined - leased,
            blocks_leased=leased,
            blocks_quarantined=quarantined,
            blocks_reserved=self._room.reserved,
            held_back=self._prefills.held_back(self._clock()),
            running=len(self.running),
            waiting=len(self._prefills) + len(self._incoming),
            steps=steps,
            blocks_idle=self.allocator.num_idle,
            prefix_tokens=self._room.looked_up,
            prefix_hits=self._room.found,
            prompts_own=self._prefills.own,
            prompts_received=self._received,
            work=self.latency.work_left(self.running, self._prefills.tokens, self.limits.max_num_batched_tokens),
            drafted=self._drafts.drafted,
            accepted=self._drafts.accepted,
            asked_ahead=dict(self.ahead.asked),
        )

    def kv_changes(self) -> list[KvChange]:
        """What others can find since the last call, and what not any more; empty without a journal."""
        return [] if self._journal is None else self._journal.take()

    @property
    def has_work(self) -> bool:
        """Whether a step could compute anything."""
        return bool(self.running) or self._prefills.head(self._clock()) is not None

    def audit(self) -> None:
        """Check that every block is free or belongs to a known sequence, and every sequence is in the queue of its
        status."""
        self._room.audit(self.sequences.values())
        queued = {
            Status.RUNNING: set(map(id, self.running)),
            Status.WAITING: set(map(id, self._prefills)),
            Status.AWAITING_BLOCKS: set(map(id, self._incoming.values())),
        }
        for sequence in self.sequences.values():
            for status, members in queued.items():
                assert (id(sequence) in members) == (sequence.status is status), f"{sequence.request_id}: {status}"
            assert sequence.num_computed <= len(sequence.block_ids) * self.limits.block_size
            assert sequence.in_flight or sequence.status is not Status.ENDED, "an ended sequence keeps its blocks"
        assert sum(map(len, queued.values())) <= len(self.sequences), "a queue has a sequence that is gone"
        assert all(sequence.num_missing == 1 for sequence in self.running.decoding.values())
        assert len(self.running) + self._room.expected <= self.limits.max_num_seqs
        self._prefills.audit()

    def _work(self, tokens: int, before: int) -> float:
        return self.latency.work(tokens, before, self.limits.max_num_batched_tokens)

    # -- parts ---------------------------------------------------------------------------------------------

    def _take(self, piece: Slice, sampled: list[Sampled], outcome: Outcome) -> None:
        """Append what would have been sampled without drafts, up to the end of the output."""
        sequence, taken = piece.sequence, list[int]()
        if not piece.drafts:
            self._append(sequence, *sampled[0], outcome)
            taken.append(sampled[0][0])
        for token_id, told in accepted(piece.drafts, sampled) if piece.drafts else ():
            if taken:
                # The token before it was a draft: its KV is there.
                self._room.computed(sequence, 1)
            self._append(sequence, token_id, told, outcome)
            taken.append(token_id)
            if sequence.request_id not in self.sequences or sequence.status is not Status.RUNNING:
                break
        self._drafts.settle(piece, taken)

    def _append(self, sequence: Sequence, token_id: int, told: Logprobs | None, outcome: Outcome) -> None:
        prompt = sequence.take_prompt_logprobs()
        sequence.token_ids.append(token_id)
        now, pace = self._clock(), sequence.pace
        sequence.pace = Pace(now, now) if pace is None else Pace(pace.first_at, now, pace.later + 1)
        reason = finish_reason(sequence, self.limits)
        if sequence.hold and reason is None and len(sequence.token_ids) > sequence.hold_at:
            self.running.remove(sequence)
            self._room.become(sequence, Status.HELD)
            blocks, tokens = list(sequence.block_ids), len(sequence.token_ids) - 1
            held = Held(sequence.request_id, token_id, blocks, tokens, told, prompt, sequence.num_cached)
            outcome.held.append(held)
            return
        outcome.tokens.append(Token(sequence.request_id, token_id, reason, told, prompt, sequence.num_cached))
        if reason is not None:
            self._forget(sequence)

    def _victim(self) -> Sequence:
        """The newest running sequence: it has the least to lose and the oldest always finishes."""
        return max(self.running, key=lambda sequence: (sequence.preemptions < _MAX_PREEMPTIONS, sequence.arrival))

    def _preempt(self, sequence: Sequence, batch: Batch) -> None:
        """Free the blocks of a running sequence; it starts over later. Its tokens stay."""
        assert not sequence.in_flight, "a step uses these blocks"
        batch.drop(sequence)
        self.running.remove(sequence)
        self._room.release(sequence)
        sequence.num_computed = 0
        sequence.preemptions += 1
        if sequence.offered:
            sequence.offered = sequence.offer = False
            self._withdrawn.append(Withdrawn(sequence.request_id))
        self._room.become(sequence, Status.WAITING)
        self._prefills.queue(sequence)

    def _forget(self, sequence: Sequence) -> None:
        """Free what the sequence has, when no step computes it any more."""
        if sequence.in_flight:
            if sequence.status is not Status.ENDED:
                self.running.remove(sequence)
                self._room.become(sequence, Status.ENDED)
            return
        del self.sequences[sequence.request_id]
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self._prefills.remove(sequence)
        elif sequence.status is Status.AWAITING_BLOCKS:
            del self._incoming[sequence.request_id]
        self._room.release(sequence)
        if sequence.status is Status.AWAITING_KV:
            self._room.expected -= 1
