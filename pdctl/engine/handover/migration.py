"""The decode side of a hand-over as a pure state machine: events in, actions out.

    QUEUED --claimed and reserved--> READING --all read--> COMMITTING --ok--> DECODING
    any failure --> LOST: blocks are dropped, the router prefills again

Claiming and reserving run side by side. A prefill may offer its first chunks while it computes the rest: they are read
as they come, and the total is known when the request itself arrives with the final terms. No token is decoded from KV
that no COMMIT has certified.
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
    """The state of one hand-over at its reader. Counts are tokens of KV: the first `readable` exist at the peer, the
    first `read` are here, the first `asked` are here or under way; `total` is None until the final terms came."""

    phase: Phase = Phase.QUEUED
    claimed: bool = False
    reserved: bool = False
    readable: int = 0
    asked: int = 0
    read: int = 0
    total: int | None = None
    commit_tries: int = 0
    reason: str = ""


class MigrationEvent(Enum):
    """What can happen to a migration. OFFERED and SEALED come with a count of tokens."""

    CLAIM_OK = "claim_ok"
    CLAIM_REFUSED = "claim_refused"
    RESERVED = "reserved"
    OFFERED = "offered"
    SEALED = "sealed"
    READ_OK = "read_ok"
    READ_FAILED = "read_failed"
    COMMIT_OK = "commit_ok"
    COMMIT_REFUSED = "commit_refused"
    COMMIT_UNANSWERED = "commit_unanswered"
    LEASE_GONE = "lease_gone"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"


class Action(Enum):
    """What the shell must do. READ: tokens `read` to `asked`."""

    READ = "read"
    COMMIT = "commit"
    DECODE = "decode"
    DROP_BLOCKS = "drop_blocks"
    RELEASE_LEASE = "release_lease"


Step = tuple[Migration, tuple[Action, ...]]

MAX_COMMIT_TRIES = 3


def advance(state: Migration, event: MigrationEvent, tokens: int = 0) -> Step:
    """The next state and what to do. Events that come too late change nothing."""
    if state.phase in FINAL:
        return state, ()
    if event in _LOSING:
        return _lose(state, event)
    if event is MigrationEvent.LEASE_GONE:
        # While committing it may be our own commit that ended the lease: its answer decides.
        return (state, ()) if state.phase is Phase.COMMITTING else _lose(state, event)
    if state.phase is Phase.COMMITTING:
        return _committing(state, event)
    return _reading(_noted(state, event, tokens))


_LOSING = {
    MigrationEvent.CLAIM_REFUSED,
    MigrationEvent.READ_FAILED,
    MigrationEvent.COMMIT_REFUSED,
    MigrationEvent.CANCELLED,
    MigrationEvent.DEADLINE,
}


def _noted(state: Migration, event: MigrationEvent, tokens: int) -> Migration:
    match event:
        case MigrationEvent.CLAIM_OK:
            return replace(state, claimed=True)
        case MigrationEvent.RESERVED:
            return replace(state, reserved=True)
        case MigrationEvent.OFFERED:
            return replace(state, readable=max(state.readable, tokens))
        case MigrationEvent.SEALED:
            return replace(state, readable=tokens, total=tokens)
        case MigrationEvent.READ_OK:
            return replace(state, read=state.asked)
        case _:
            return state


def _reading(state: Migration) -> Step:
    """Read what is readable, one piece at a time; commit when all of it is here."""
    if not (state.claimed and state.reserved):
        return state, ()
    state = replace(state, phase=Phase.READING)
    if state.asked > state.read:
        return state, ()
    if state.readable > state.read:
        return replace(state, asked=state.readable), (Action.READ,)
    if state.total is not None and state.read == state.total:
        return replace(state, phase=Phase.COMMITTING, commit_tries=1), (Action.COMMIT,)
    return state, ()


def _committing(state: Migration, event: MigrationEvent) -> Step:
    if event is MigrationEvent.COMMIT_OK:
        return replace(state, phase=Phase.DECODING), (Action.DECODE,)
    if event is MigrationEvent.COMMIT_UNANSWERED:
        if state.commit_tries >= MAX_COMMIT_TRIES:
            return _lose(state, event)
        return replace(state, commit_tries=state.commit_tries + 1), (Action.COMMIT,)
    return state, ()


def _lose(state: Migration, event: MigrationEvent) -> Step:
    """Give up. The lease is released even where it may be gone: releasing is idempotent, leaking is not."""
    lost = replace(state, phase=Phase.LOST, reason=event.value)
    return lost, (Action.DROP_BLOCKS, Action.RELEASE_LEASE)
