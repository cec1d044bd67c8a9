"""The scheduler over a pool whose slots hold the tokens that they were computed from, instead of KV."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict, Unpack

from pdctl.engine.cache import prefix
from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.ipc.messages import KvRemoved, Sampling
from pdctl.engine.schedule.batch import Limits, Outcome, Slice
from pdctl.engine.schedule.peers.kv_journal import KvJournal
from pdctl.engine.schedule.scheduler import Scheduler
from pdctl.engine.schedule.sequence import Sequence, Status
from pdctl.speculative import Speculative

BLOCK = 4
EOS = 99
LONGEST = 64


# How often a message waits, which could change the next step.
_DISTURBED = 0.1


@dataclass
class Flight:
    """A launched step: its slices, their tokens and blocks at that moment, and the step before it if that computed
    then. `sampled`: by request; None until it is computed."""

    batch: list[Slice]
    tokens: list[list[int]]
    blocks: list[list[int]]
    before: Flight | None
    sampled: dict[str, list[int]] | None = None


class Options(TypedDict, total=False):
    """Fields of a Sequence that most tests leave as they are."""

    salt: str
    priority: int
    status: Status
    kv_tokens: int
    kv_segment: int
    hold: bool
    offer: bool


def varied(tokens: tuple[int, ...]) -> int:
    """A model whose next token depends on all tokens before it."""
    return hash(tokens) % 97


def cyclic(tokens: tuple[int, ...]) -> int:
    """A model that soon repeats itself: the next token depends on the last two."""
    return (3 * tokens[-1] + tokens[max(0, len(tokens) - 2)] + 1) % 7


class Engine:
    """One engine. Freed blocks hold nothing, and reading a slot of other tokens fails. `ahead`: the next step is
    launched while one computes, as far as the scheduler can; it is computed at once, or as late as possible, by
    chance."""

    def __init__(
        self,
        blocks: int = 64,
        tokens: int = 64,
        seqs: int = 4,
        policy: str = "fcfs",
        shares: bool = True,
        leased: int = 2**31,
        model: Callable[[tuple[int, ...]], int] = varied,
        speculative: Speculative | None = None,
        segment: int = 0,
        ahead: random.Random | None = None,
        quota: int = 0,
    ) -> None:
        self.slots: list[tuple[int, ...] | None] = [None] * (blocks * BLOCK)
        self.model = model
        self.journal = KvJournal(tells_tokens=True)
        self.told: set[bytes] = set()
        allocator = BlockAllocator(blocks, self.poison, self.journal.removed, quota)
        limits = Limits(seqs, tokens, LONGEST, BLOCK, frozenset({EOS}), leased, policy, segment=segment)
        self.segment = segment
        root = b"root" if shares else None
        self.scheduler = Scheduler(limits, allocator, root=root, journal=self.journal, speculative=speculative)
        self.outputs: dict[str, list[int]] = {}
        self.reasons: dict[str, str | None] = {}
        self.cached: dict[str, int] = {}
        self.computed = self.steps = 0
        self.ahead = ahead
        self.flight: Flight | None = None

    def poison(self, blocks: list[int]) -> None:
        """What was in these blocks is gone."""
        for block in blocks:
            self.slots[block * BLOCK : (block + 1) * BLOCK] = [None] * BLOCK

    def add(self, name: str, tokens: list[int], output: int = 2, **options: Unpack[Options]) -> None:
        """Queue a request."""
        self.add_sampled(name, tokens, Sampling(max_tokens=output), **options)

    def add_sampled(self, name: str, tokens: list[int], sampling: Sampling, **options: Unpack[Options]) -> None:
        """Queue a request with these parameters."""
        sequence = Sequence(name, list(tokens), len(tokens), sampling, **options)
        assert self.scheduler.add(sequence) is None

    def step(self) -> list[Slice]:
        """Compute one batch."""
        return self.step_with_outcome()[0]

    def step_with_outcome(self) -> tuple[list[Slice], Outcome]:
        """Compute one batch, and say what came of it. A step ahead of it may still compute then."""
        flight = self.flight or self._launch(self.scheduler.schedule(), None)
        self.flight = None
        if self.ahead is not None and flight.batch:
            is_quiet = self.ahead.random() > _DISTURBED
            following = self.scheduler.schedule_ahead(flight.batch, is_quiet)
            self.flight = self._launch(following, flight) if following else None
        return flight.batch, self._finish(flight)

    def settle(self) -> Outcome:
        """Finish what still computes."""
        flight, self.flight = self.flight, None
        return self._finish(flight) if flight is not None else Outcome()

    @property
    def has_work(self) -> bool:
        """Whether anything computes or could."""
        return self.flight is not None or self.scheduler.has_work

    def _launch(self, batch: list[Slice], before: Flight | None) -> Flight:
        assert sum(piece.num_rows for piece in batch) <= self.scheduler.limits.max_num_batched_tokens
        tokens = [list(piece.sequence.token_ids) for piece in batch]
        flight = Flight(batch, tokens, [list(piece.sequence.block_ids) for piece in batch], before)
        if self.ahead is None or self.ahead.random() < 0.5:
            self._run(flight)
        return flight

    def _finish(self, flight: Flight) -> Outcome:
        batch, sampled = flight.batch, self._run(flight)
        outcome = self.scheduler.update(batch, [token for tokens in sampled.values() for token in tokens])
        self.audit()
        self.steps += bool(batch)
        for token in outcome.tokens:
            self.outputs.setdefault(token.request_id, []).append(token.token_id)
            self.reasons[token.request_id] = token.finish_reason
            self.cached.setdefault(token.request_id, token.cached)
        return outcome

    def audit(self) -> None:
        """The scheduler's own, and: whoever follows the changes knows what can be found, and from which tokens."""
        self.scheduler.audit()
        for change in self.scheduler.kv_changes():
            if isinstance(change, KvRemoved):
                for name in change.names:
                    self.told.remove(name)
                continue
            before = change.parent
            for number, name in enumerate(change.names):
                assert name not in self.told
                tokens = change.tokens[number * BLOCK : (number + 1) * BLOCK]
                assert before is None or name == prefix.following(before, tokens)
                self.told.add(name)
                before = name
        assert self.told == self.scheduler.allocator.names()

    def run(self) -> None:
        """Run until nothing is left to compute."""
        for _ in range(3000):
            if not self.has_work:
                return
            self.step()
        raise AssertionError("requests starve")

    def write(self, sequence: Sequence, first: int, tokens: list[int]) -> None:
        """Put into the slots from token `first` on what a peer computed."""
        for at in range(first, len(tokens)):
            self.slots[_slot(sequence.block_ids, at)] = tuple(tokens[: at + 1])

    def _run(self, flight: Flight) -> dict[str, list[int]]:
        """Compute a step, behind the one before it."""
        if flight.sampled is None:
            before = {} if flight.before is None else self._run(flight.before)
            flight.before = None
            flight.sampled = {}
            for piece, tokens, blocks in zip(flight.batch, flight.tokens, flight.blocks, strict=True):
                name = piece.sequence.request_id
                flight.sampled[name] = self._compute(piece, [*tokens, *before.get(name, [])], blocks)
        return flight.sampled

    def _compute(self, piece: Slice, known: list[int], blocks: list[int]) -> list[int]:
        """Write what the tokens depend on, read everything before them, and choose the next tokens by it."""
        end = piece.start + piece.num_rows
        assert len(known) >= piece.start + piece.count
        tokens = [*known[: piece.start + piece.count], *piece.drafts]
        self.computed += piece.num_rows
        if self.segment and piece.count > 1:
            assert piece.start % self.segment == 0, "another slice than the one of a miss"
            assert piece.count == self.segment or end == len(known)
        for at in range(piece.start, end):
            self.slots[_slot(blocks, at)] = tuple(tokens[: at + 1])
        seen = [self.slots[_slot(blocks, at)] for at in range(end)]
        assert seen == [tuple(tokens[: at + 1]) for at in range(end)], "the KV of other tokens was read"
        return [self.model(tuple(tokens[: at + 1])) for at in range(end - piece.num_sampled, end)]


def _slot(blocks: list[int], at: int) -> int:
    return blocks[at // BLOCK] * BLOCK + at % BLOCK
