"""The decode side of a hand-over as a pure state machine: events in, actions out.

    QUEUED --claimed and reserved--> READING --read--> COMMITTING --ok--> DECODING
    any failure --> LOST: blocks are dropped, the router prefills again

Claiming and reserving run side by side. No token is decoded from KV that no COMMIT has certified.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum


class Phase(Enum):
    """Where a migration stands. DECODING and LOST are final."""

    QUEUED = "queued"
    READING = "reading"
    COMMITTING = "committing"
    DECODING = "decoding"
    LOST = "lost"


FINAL = (Phase.DECODING, Phase.LOST)


@dataclass(frozen=True, slots=True)
class Migration:
    """The state of one hand-over at its reader."""

    phase: Phase = Phase.QUEUED
    claimed: bool = False
    reserved: bool = False
    commit_tries: int = 0
    reason: str = ""


class Event(Enum):
    """What can happen to a migration."""

    CLAIM_OK = "claim_ok"
    CLAIM_REFUSED = "claim_refused"
    RESERVED = "reserved"
    READ_OK = "read_ok"
    READ_FAILED = "read_failed"
    COMMIT_OK = "commit_ok"
    COMMIT_REFUSED = "commit_refused"
    COMMIT_UNANSWERED = "commit_unanswered"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"


class Action(Enum):
    """What the shell must do."""

    READ = "read"
    COMMIT = "commit"
    DECODE = "decode"
    DROP_BLOCKS = "drop_blocks"
    RELEASE_LEASE = "release_lease"


MAX_COMMIT_TRIES = 3


def advance(state: Migration, event: Event) -> tuple[Migration, tuple[Action, ...]]:
    """The next state and what to do. Events that come too late change nothing."""
    if state.phase in FINAL:
        return state, ()
    if event in _LOSING:
        return _lose(state, event)
    if state.phase is Phase.QUEUED:
        return _queued(state, event)
    if state.phase is Phase.READING and event is Event.READ_OK:
        return replace(state, phase=Phase.COMMITTING, commit_tries=1), (Action.COMMIT,)
    if state.phase is Phase.COMMITTING and event is Event.COMMIT_OK:
        return replace(state, phase=Phase.DECODING), (Action.DECODE,)
    if state.phase is Phase.COMMITTING and event is Event.COMMIT_UNANSWERED:
        if state.commit_tries >= MAX_COMMIT_TRIES:
            return _lose(state, event)
        return replace(state, commit_tries=state.commit_tries + 1), (Action.COMMIT,)
    return state, ()


_LOSING = {
    Event.CLAIM_REFUSED,
    Event.READ_FAILED,
    Event.COMMIT_REFUSED,
    Event.CANCELLED,
    Event.DEADLINE,
}


def _queued(state: Migration, event: Event) -> tuple[Migration, tuple[Action, ...]]:
    if event is Event.CLAIM_OK:
        state = replace(state, claimed=True)
    elif event is Event.RESERVED:
        state = replace(state, reserved=True)
    if state.claimed and state.reserved:
        return replace(state, phase=Phase.READING), (Action.READ,)
    return state, ()


def _lose(state: Migration, event: Event) -> tuple[Migration, tuple[Action, ...]]:
    """Give up. The lease is released even where it may be gone: releasing is idempotent, leaking is not."""
    lost = replace(state, phase=Phase.LOST, reason=event.value)
    return lost, (Action.DROP_BLOCKS, Action.RELEASE_LEASE)
