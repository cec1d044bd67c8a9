"""Who may see the page: this machine by its own names, from no other origin, with a token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.supervisor.dashboard.access import Gate, Needs, host_of

GATE = Gate("the run's secret", "127.0.0.5")
HOST = b"127.0.0.1:8099"


def headers(token: str = "", **more: bytes) -> dict[bytes, bytes]:
    found = {b"host": HOST} | ({b"authorization": f"Bearer {token}".encode()} if token else {})
    return found | {name.replace("_", "-").encode(): value for name, value in more.items()}


def status(needs: Needs, given: dict[bytes, bytes]) -> int:
    refusal = GATE.refusal(needs, given)
    if refusal is None:
        return 200
    assert refusal.reason[0].isupper()
    assert refusal.reason.rstrip(".")[-1].isalnum() or refusal.reason.endswith(("dash", "--write"))
    return refusal.status


def test_a_link_to_read_reads() -> None:
    given = headers(GATE.token(write=False))
    assert status(Needs.READ, given) == 200
    assert not GATE.may_write(given)
    refusal = GATE.refusal(Needs.WRITE, given)
    assert refusal is not None
    assert refusal.status == 403
    assert "pdctl dash --write" in refusal.reason


def test_a_link_to_write_does_both() -> None:
    given = headers(GATE.token(write=True))
    assert status(Needs.READ, given) == status(Needs.WRITE, given) == 200
    assert GATE.may_write(given)


def test_without_a_token_there_are_only_the_pages_files() -> None:
    assert status(Needs.FILE, headers()) == 200
    assert status(Needs.READ, headers()) == status(Needs.WRITE, headers()) == 401


@given(st.binary(max_size=60))
def test_no_other_word_is_a_token(word: bytes) -> None:
    if word not in (b"Bearer " + GATE.token(write).encode() for write in (False, True)):
        assert status(Needs.READ, {b"host": HOST, b"authorization": word}) == 401


@pytest.mark.parametrize("name", [b"evil.example:8099", b"127.0.0.1.evil.example", b"", b"10.0.0.7:8099", b"[::2]:1"])
@pytest.mark.parametrize("needs", list(Needs))
def test_another_host_name_is_refused(needs: Needs, name: bytes) -> None:
    """DNS rebinding: a page of evil.example, which now points here."""
    assert status(needs, headers(GATE.token(write=True)) | {b"host": name}) == 403


@pytest.mark.parametrize("name", [b"localhost", b"localhost:9000", b"[::1]:8099", b"127.0.0.5:1", b"LOCALHOST:1"])
def test_a_tunnel_may_end_at_another_port(name: bytes) -> None:
    assert status(Needs.READ, headers(GATE.token(write=False)) | {b"host": name}) == 200


@pytest.mark.parametrize("origin", [b"https://evil.example", b"null", b"http://127.0.0.1:9999", b"https://127.0.0.1:8099"])
def test_another_origin_is_refused(origin: bytes) -> None:
    assert status(Needs.READ, headers(GATE.token(write=True), origin=origin)) == 403


def test_our_own_origin_is_none() -> None:
    given = headers(GATE.token(write=True), origin=b"http://" + HOST, sec_fetch_site=b"same-origin")
    assert status(Needs.WRITE, given) == 200
    for site in (b"cross-site", b"same-site"):
        assert status(Needs.READ, headers(GATE.token(write=True), sec_fetch_site=site)) == 403


def test_tokens_belong_to_a_run() -> None:
    assert GATE.token(True) != GATE.token(False)
    assert Gate("another secret", "127.0.0.1").token(False) != GATE.token(False)
    assert Gate("the run's secret", "127.0.0.1").token(False) == GATE.token(False)
    assert len(GATE.token(False)) == 40


def test_hosts() -> None:
    assert [host_of(name) for name in ("a:1", "a", "[::1]:1", "[::1]", "")] == ["a", "a", "::1", "::1", ""]
