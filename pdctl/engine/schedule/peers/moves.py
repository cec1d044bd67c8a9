"""Sequences that move to another engine while they decode.

A move is a hand-over in the middle of an answer: the sequence is held, and a peer reads its KV under a lease. To keep
the pause short, the KV so far can be offered first. The peer copies it while the sequence gets a few more tokens, and
only the KV of these is left when it is held.
"""

from __future__ import annotations

from collections.abc import Iterable

from pdctl.engine.schedule.room import Room
from pdctl.engine.schedule.sequence import Sequence, Status

# Tokens that an offered sequence still gets here. The peer needs about a step to reserve its blocks, and a copy within
# a host takes less than another one.
TOKENS_AHEAD = 4
# With fewer tokens left than this, the end comes sooner than a move.
_LEAST_LEFT = 4


def unbegun(sequences: Iterable[Sequence]) -> list[str]:
    """The prompts for peers that wait, and of which nothing is computed here."""
    waiting = (sequence for sequence in sequences if sequence.status is Status.WAITING and sequence.hold)
    return [sequence.request_id for sequence in waiting if not (sequence.num_computed or sequence.preemptions)]


def begin(sequence: Sequence, offer: bool, longest: int, room: Room) -> bool:
    """Have a sequence held for a peer. False if it cannot move now: it does not decode, a step computes it, it has
    nearly ended, or too many blocks are for peers already. `longest`: tokens that a sequence may have."""
    ahead = TOKENS_AHEAD if offer else 1
    left = min(sequence.sampling.max_tokens - sequence.num_output, longest - len(sequence.token_ids))
    can = sequence.status is Status.RUNNING and not sequence.hold and sequence.num_missing == 1
    if not can or sequence.in_flight or left < ahead + _LEAST_LEFT or not room.allows_lease(sequence):
        return False
    room.pin(sequence)
    sequence.offer = offer
    sequence.hold_at = len(sequence.token_ids) + ahead - 1
    return True
