"""Speculation in the scheduler: which sequences get guesses in a step, and what of them holds.

Guesses use what a step has left. They take blocks only while the pool has some to spare, and give back those that held
no accepted token, so they never cost another sequence its blocks.

A guess is verified only if it should pay: as long as the tokens that it is expected to bring, per second that it adds
to the step, are more than the step brings without guesses (as in SmartSpec, Liu et al. 2024). On a CPU, and in large
batches, a row costs nearly what a token costs; on a GPU it is nearly free.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Ordered

from pdctl.engine.ipc.messages import Logprobs
from pdctl.engine.schedule.batch import Batch, Limits, Slice
from pdctl.engine.schedule.latency import LatencyModel
from pdctl.engine.schedule.room import Room
from pdctl.engine.schedule.sequence import Drafting, Sequence
from pdctl.engine.speculation import drafter
from pdctl.latency import step_of
from pdctl.speculative import Speculative

# How much the newest guess counts in the rate of right ones, of its sequence and of all, with which a sequence begins.
_NEWEST, _NEWEST_OF_ALL = 0.2, 0.02
# A guess must be expected to pay so many times over: the model of steps may be wrong.
_MARGIN = 1.25

# A sampled token and its log probabilities.
Sampled = tuple[int, Logprobs | None]


class Drafts:
    """`drafted`, `accepted`: guesses that were verified, and those of them that were right. Without `settings` nothing
    is guessed."""

    def __init__(self, limits: Limits, room: Room, settings: Speculative | None) -> None:
        self.drafted = self.accepted = 0
        self._limits = limits
        self._room = room
        self._settings = settings
        self._rate = 0.5

    def fill(self, batch: Batch, latency: LatencyModel) -> None:
        """Give guesses to the sequences of a step that decode, as far as its budget goes and they pay."""
        if self._settings is None:
            return
        decodes = [piece for piece in batch.slices if piece.count == 1 and piece.samples]
        least = _least_chance(decodes, latency)
        for piece in decodes:
            if _may_be_guessed(piece.sequence):
                self._guess(self._settings, piece.sequence, batch, least)

    def settle(self, piece: Slice, taken: Ordered[int]) -> None:
        """Judge the guesses by the tokens that were taken, and give back the blocks of the others. What was guessed but
        not verified is judged, too: so a sequence that begins to repeat itself is noticed."""
        sequence, drafting = piece.sequence, piece.sequence.drafting
        if drafting is None:
            return
        for guess, token_id in zip(drafting.guesses, taken, strict=False):
            drafting.rate += _NEWEST * ((guess == token_id) - drafting.rate)
            self._rate += _NEWEST_OF_ALL * ((guess == token_id) - self._rate)
            if guess != token_id:
                break
        drafting.guesses = []
        if piece.drafts:
            self.drafted += len(piece.drafts)
            self.accepted += len(taken) - 1
            self._room.trim(sequence)

    def _guess(self, settings: Speculative, sequence: Sequence, batch: Batch, least: float) -> None:
        if sequence.drafting is None:
            sequence.drafting = Drafting(drafter(settings), self._rate)
        drafting, length = sequence.drafting, len(sequence.token_ids)
        # The token after the last guess is sampled too.
        left = min(sequence.sampling.max_tokens - sequence.num_output, self._limits.max_model_len - length) - 1
        drafting.guesses = drafting.drafter.draft(sequence.token_ids, min(settings.tokens, left)) if left > 0 else []
        drafts = drafting.guesses[: min(_number(drafting.rate, least, settings.tokens), batch.budget)]
        if drafts and not self._room.grow(sequence, length + len(drafts), keep_spare=True):
            drafts = drafts[: len(sequence.block_ids) * self._limits.block_size - length]
        if drafts:
            batch.draft(sequence, tuple(drafts))


def accepted(drafts: Ordered[int], sampled: Ordered[Sampled]) -> Iterator[Sampled]:
    """The tokens that would have been sampled one after the other: each is right if all before it were guessed."""
    yield sampled[0]
    for guess, before, found in zip(drafts, sampled, sampled[1:], strict=False):
        if before[0] != guess:
            return
        yield found


def _may_be_guessed(sequence: Sequence) -> bool:
    """KV that is kept for a peer ends at a certain token, and a grammar's state goes only forward."""
    return not sequence.hold and not sequence.sampling.grammar


def _least_chance(decodes: list[Slice], latency: LatencyModel) -> float:
    """The chance of being right above which one more row pays beside these sequences."""
    if not decodes or not latency.is_fitted:
        return 0.0
    step = step_of((1, piece.start) for piece in decodes)
    seconds, count = latency.times.seconds(step), len(decodes)
    # One more row is like one more sequence that decodes: it has its own attention, and its own logits.
    more = step_of([*((1, piece.start) for piece in decodes), (1, int(step.context) // count)])
    return _MARGIN * (latency.times.seconds(more) - seconds) * count / seconds if seconds > 0 else 0.0


def _number(rate: float, least: float, most: int) -> int:
    """How many guesses in a row are likely enough, if each is right at this rate."""
    count, chance = 0, rate
    while count < most and chance >= least:
        count, chance = count + 1, chance * rate
    return count
