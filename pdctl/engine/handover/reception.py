"""The decode side of a hand-over as a pure state machine: events in, actions out.

    QUEUED --claimed and reserved--> READING --all read--> COMMITTING --ok--> DECODING
    any failure --> LOST: blocks are dropped, the router prefills again

Claiming and reserving run concurrently. A prefill may offer its first chunks while it computes the rest: they are read
as they come, and the total is known when the request itself arrives with the final lease. No token is decoded from KV
without a successful COMMIT."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum


class Phase(Enum):
    """The phase of a reception. DECODING and LOST are final."""

    QUEUED = "queued"
    READING = "reading"
    COMMITTING = "committing"
    DECODING = "decoding"
    LOST = "lost"


FINAL = (Phase.DECODING, Phase.LOST)


@dataclass(frozen=True, slots=True)
class Reception:
    """The state of one hand-over at its reader. Counts are tokens of KV: the first `readable` exist at the peer, the
    first `read` are here, the first `asked` are here or requested; `total` is None until the final lease is known."""

    phase: Phase = Phase.QUEUED
    claimed: bool = False
    reserved: bool = False
    readable: int = 0
    asked: int = 0
    read: int = 0
    total: int | None = None
    commit_tries: int = 0
    reason: str = ""


class ReceptionEvent(Enum):
    """Events of a reception. OFFERED and SEALED come with a token count, and RESERVED with the tokens that are here."""

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
    """Actions that the caller must execute. READ: tokens `read` to `asked`."""

    READ = "read"
    COMMIT = "commit"
    DECODE = "decode"
    DROP_BLOCKS = "drop_blocks"
    RELEASE_LEASE = "release_lease"


Step = tuple[Reception, tuple[Action, ...]]

MAX_COMMIT_TRIES = 3


def advance(state: Reception, event: ReceptionEvent, tokens: int = 0) -> Step:
    """The next state and the actions. Late events change nothing."""
    if state.phase in FINAL:
        return state, ()
    if event in _LOSING:
        return _lose(state, event)
    if event is ReceptionEvent.LEASE_GONE:
        # While committing, our own commit may have ended the lease: its answer decides.
        return (state, ()) if state.phase is Phase.COMMITTING else _lose(state, event)
    if state.phase is Phase.COMMITTING:
        return _committing(state, event)
    return _reading(_noted(state, event, tokens))


_LOSING = {
    ReceptionEvent.CLAIM_REFUSED,
    ReceptionEvent.READ_FAILED,
    ReceptionEvent.COMMIT_REFUSED,
    ReceptionEvent.CANCELLED,
    ReceptionEvent.DEADLINE,
}


def _noted(state: Reception, event: ReceptionEvent, tokens: int) -> Reception:
    match event:
        case ReceptionEvent.CLAIM_OK:
            return replace(state, claimed=True)
        case ReceptionEvent.RESERVED:
            return replace(state, reserved=True, read=tokens, asked=tokens)
        case ReceptionEvent.OFFERED:
            return replace(state, readable=max(state.readable, tokens))
        case ReceptionEvent.SEALED:
            return replace(state, readable=tokens, total=tokens)
        case ReceptionEvent.READ_OK:
            return replace(state, read=state.asked)
        case _:
            return state


def _reading(state: Reception) -> Step:
    """Read available tokens, one piece at a time; commit when all are here."""
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


def _committing(state: Reception, event: ReceptionEvent) -> Step:
    if event is ReceptionEvent.COMMIT_OK:
        return replace(state, phase=Phase.DECODING), (Action.DECODE,)
    if event is ReceptionEvent.COMMIT_UNANSWERED:
        if state.commit_tries >= MAX_COMMIT_TRIES:
            return _lose(state, event)
        return replace(state, commit_tries=state.commit_tries + 1), (Action.COMMIT,)
    return state, ()


def _lose(state: Reception, event: ReceptionEvent) -> Step:
    """Give up. The lease is released even if it may be gone: a repeated release does no harm, a leak does."""
    lost = replace(state, phase=Phase.LOST, reason=event.value)
    return lost, (Action.DROP_BLOCKS, Action.RELEASE_LEASE)
