"""The step that follows one that still computes: so a device need not wait until tokens were read back and scheduled.

The tokens of a running step are unknown, but often they decide nothing: if all sequences decode and go on, the next
step gives each of them one token more. Such a step is scheduled ahead; the device takes its input tokens from the step
before it. Everything else is scheduled when the step has ended, as without this module.

A sequence whose output ends with a token that nobody could foresee (an end token, a stop token, an abort) is computed
once too often. What that yields is dropped, and its blocks stay its own until the step ahead has ended
(`Status.ENDED`).
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from typing import NamedTuple

from pdctl.engine.schedule.batch import Limits, Slice
from pdctl.engine.schedule.endings import ends_at
from pdctl.engine.schedule.prompts.prefills import Prefills
from pdctl.engine.schedule.room import Room
from pdctl.engine.schedule.running import Running
from pdctl.engine.schedule.sequence import Sequence, Status

# What came of the attempts to schedule ahead: the step was, or why it was not.
LAUNCHED = "launched"
PROMPTS = "prompts"  # a prompt is computed, or one that waits could join
SAMPLING = "sampling"  # a token depends on the host: grammar, penalties, log probabilities
HAND_OVERS = "hand_overs"  # a sequence's KV is for a peer
GUESSES = "guesses"  # they need the newest tokens
BUDGET = "budget"  # not everything that decodes is in the step
ENDS = "ends"  # every sequence has its last token
BLOCKS = "blocks"  # there are too few for one token more of each
MESSAGES = "messages"  # a message waits, which may change the batch


class Following(NamedTuple):
    """The next step, or [] and why it cannot be told yet."""

    batch: list[Slice]
    why: str


def is_plain(piece: Slice) -> bool:
    """Whether a device computes this slice without the host: one token in, one out, chosen by the logits as they
    are."""
    sampling = piece.sequence.sampling
    is_decode = piece.count == 1 and piece.samples and not piece.drafts
    return is_decode and not sampling.is_shaped and sampling.logprobs < 0 and sampling.prompt_logprobs < 0


class Ahead:
    """Chooses the steps after running ones. `guesses`: whether tokens are guessed; `asked`: how often the next step was
    asked for, by what came of it."""

    def __init__(self, limits: Limits, room: Room, running: Running, prefills: Prefills, guesses: bool) -> None:
        self._limits = limits
        self._room = room
        self._running = running
        self._prefills = prefills
        self._guesses = guesses
        self.asked: dict[str, int] = {}

    def following(self, batch: Ordered[Slice], now: float, is_quiet: bool = True) -> Following:
        """The step after `batch`, the only one that computes now. The blocks for it are taken. `is_quiet`: no message
        waits."""
        found = self._following(batch, now) if is_quiet else Following([], MESSAGES)
        self.asked[found.why] = self.asked.get(found.why, 0) + 1
        return found

    def _following(self, batch: Ordered[Slice], now: float) -> Following:
        assert all(piece.sequence.in_flight == 1 for piece in batch), "another step computes, too"
        going = [piece.sequence for piece in batch if piece.sequence.status is Status.RUNNING]
        staying = [sequence for sequence in going if not ends_at(sequence, _known(sequence), self._limits)]
        why = self._why_not(batch, going, staying, now)
        if not why and not self._room.grow_all([(sequence, _known(sequence)) for sequence in staying]):
            why = BLOCKS
        if why:
            return Following([], why)
        return Following([Slice(sequence, _known(sequence) - 1, 1, True) for sequence in staying], LAUNCHED)

    def _why_not(self, batch: Ordered[Slice], going: list[Sequence], staying: list[Sequence], now: float) -> str:
        if self._guesses:
            return GUESSES
        if self._running.partial or any(piece.count > 1 for piece in batch):
            return PROMPTS
        if not all(is_plain(piece) for piece in batch):
            return SAMPLING
        if any(sequence.hold or sequence.offer for sequence in going):
            return HAND_OVERS
        if len(going) < len(self._running):
            return BUDGET
        if not staying:
            return ENDS
        has_seat = self._prefills.has_seat or len(staying) < len(going)
        return PROMPTS if has_seat and self._prefills.head(now) is not None else ""


def _known(sequence: Sequence) -> int:
    """The number of a sequence's tokens after the running step."""
    return len(sequence.token_ids) + sequence.in_flight
