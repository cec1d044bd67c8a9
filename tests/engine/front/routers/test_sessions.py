"""Sessions of kept KV: each hand-over is given out once, and none is remembered for longer than its lease."""

from __future__ import annotations

from pdctl.engine.front.routers.sessions import SessionBook, new_session
from tests.engine.front.routers.given import hand_over

GIVEN = hand_over("e.1")


def test_a_session_is_taken_once() -> None:
    book = SessionBook()
    session = book.keep(GIVEN, now=0)
    assert book.take(session) == GIVEN
    assert book.take(session) is None
    assert book.take(session + 1) is None


def test_sessions_end_with_their_leases() -> None:
    book = SessionBook()
    old = book.keep(GIVEN, now=0)
    young = book.keep(GIVEN, now=GIVEN.lease_s)
    assert book.take(old) is None
    assert book.take(young) == GIVEN


def test_the_number_of_sessions_is_limited() -> None:
    book = SessionBook()
    sessions = [book.keep(GIVEN, now=0) for _ in range(4200)]
    assert book.take(sessions[0]) is None
    assert sum(book.take(session) is not None for session in sessions) == 4096


def test_a_session_is_a_whole_number_that_every_json_library_reads() -> None:
    assert all(0 < new_session() <= 2**52 for _ in range(1000))
