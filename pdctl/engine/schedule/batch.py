"""What a step is made of: the limits it keeps, the slices it computes, and what came of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pdctl.engine.ipc.messages import Held, Progress, Token, Withdrawn
from pdctl.engine.schedule.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Limits:
    """Budgets of one engine. `max_leased_blocks`: held prefills wait if they would exceed this. `policy`: the order of
    prefills, a name in `policies.POLICIES`. `ttft_s`: the target of requests without one. `keeps_tpot`: prompts
    are computed in chunks that leave time for sequences with a target. `segment`: prompts are computed in segments of
    so many tokens and found only by whole ones, so that a hit has the bits of a miss; 0: as the budget allows."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    eos_token_ids: frozenset[int]
    max_leased_blocks: int = 2**31
    policy: str = "fcfs"
    ttft_s: float = 2.0
    keeps_tpot: bool = True
    segment: int = 0


@dataclass(frozen=True, slots=True)
class Slice:
    """`count` tokens of `sequence` from `start` on; `samples` when the last of them yields a new token. `drafts`:
    guesses of the tokens after those. They are computed as well, and each yields a token."""

    sequence: Sequence
    start: int
    count: int
    samples: bool
    drafts: tuple[int, ...] = ()

    @property
    def token_ids(self) -> list[int]:
        """The tokens to compute."""
        return [*self.sequence.token_ids[self.start : self.start + self.count], *self.drafts]

    @property
    def num_rows(self) -> int:
        """Tokens to compute, with the drafts."""
        return self.count + len(self.drafts)

    @property
    def parts(self) -> list[Slice]:
        """What attention takes together: all, but drafts one by one, as decodes are. In half precision, several rows at
        once would be rounded differently."""
        if not self.drafts:
            return [self]
        end = self.start + self.count
        drafts = [Slice(self.sequence, end + at, 0, False, (guess,)) for at, guess in enumerate(self.drafts)]
        return [replace(self, drafts=()), *drafts]

    @property
    def num_sampled(self) -> int:
        """Tokens that it yields."""
        return self.samples + len(self.drafts)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The results of a step, for the front."""

    tokens: list[Token] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    withdrawn: list[Withdrawn] = field(default_factory=list)


def launched(batch: list[Slice]) -> list[Slice]:
    """Note that a step computes these slices."""
    for piece in batch:
        piece.sequence.in_flight += 1
    return batch


class Batch:
    """The slices of one step, by request, and the budget of tokens that is left. `num_ending`: prompts whose last
    missing tokens are among them."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.num_ending = 0
        self._slices: dict[str, Slice] = {}

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.request_id in self._slices

    @property
    def slices(self) -> list[Slice]:
        """The slices in the order in which they were added."""
        return list(self._slices.values())

    def limit(self, tokens: int) -> None:
        """Compute no more than `tokens` in addition to what is in the batch."""
        self.budget = min(self.budget, tokens)

    def add(self, sequence: Sequence, count: int) -> None:
        """Compute the next `count` tokens of `sequence`."""
        assert 0 < count <= self.budget
        assert sequence not in self
        piece = Slice(sequence, sequence.num_computed, count, count == sequence.num_missing)
        self._slices[sequence.request_id] = piece
        self.budget -= count
        self.num_ending += _ends(piece)

    def draft(self, sequence: Sequence, drafts: tuple[int, ...]) -> None:
        """Verify guesses of what follows a sequence's tokens."""
        assert len(drafts) <= self.budget
        piece = self._slices[sequence.request_id]
        assert piece.samples
        self._slices[sequence.request_id] = replace(piece, drafts=drafts)
        self.budget -= len(drafts)

    def drop(self, sequence: Sequence) -> None:
        """Take the sequence out, if it is in the batch; its tokens can be used by others."""
        piece = self._slices.pop(sequence.request_id, None)
        if piece is not None:
            self.budget += piece.num_rows
            self.num_ending -= _ends(piece)


def _ends(piece: Slice) -> bool:
    return piece.samples and piece.count > 1
