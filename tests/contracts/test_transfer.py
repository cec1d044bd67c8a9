"""What every transport must do, over real peers in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdctl.engine.layout import Span
from pdctl.engine.transfer import TRANSPORTS, TransferError, transport_kind

SIZE = 1 << 20

_PEER = """
import sys
import numpy as np
from pdctl.engine.transfer import transport_kind
name, epoch, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
region = transport_kind(name).allocate(size, epoch)
content = np.random.default_rng(int(epoch, 16)).integers(0, 256, size, dtype=np.uint8)
np.frombuffer(region.view, dtype=np.uint8)[:] = content
print(region.address, flush=True)
sys.stdin.read()
"""


@dataclass
class Peer:
    address: str
    process: subprocess.Popen[str]
    content: np.ndarray


@contextmanager
def peer(transport: str, epoch: str = "a1") -> Iterator[Peer]:
    process = subprocess.Popen(
        [sys.executable, "-c", _PEER, transport, epoch, str(SIZE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        yield Peer(address, process, np.random.default_rng(int(epoch, 16)).integers(0, 256, SIZE, dtype=np.uint8))
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.fixture(params=TRANSPORTS, scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def shared_peer(name: str) -> Iterator[Peer]:
    with peer(name) as found:
        yield found


Opened = tuple[np.ndarray, Callable[[str, list[Span]], int]]


@contextmanager
def opened(name: str) -> Iterator[Opened]:
    kind = transport_kind(name)
    region = kind.allocate(SIZE, "0f")
    transport = kind.open_transport(region)
    view = np.frombuffer(region.view, dtype=np.uint8)
    try:
        yield view, lambda address, spans: transport.read(address, SIZE, spans)
    finally:
        transport.close()
        region.close()


@settings(max_examples=40, deadline=None)
@given(
    spans=st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(0, SIZE - 1), st.integers(0, 70_000)), max_size=12)
)
def test_bytes_arrive_as_they_were(name: str, shared_peer: Peer, spans: list[tuple[int, int, int]]) -> None:
    wanted = [Span(s, t, min(n, SIZE - s, SIZE - t)) for s, t, n in spans]
    with opened(name) as (view, read):
        expected = np.zeros(SIZE, dtype=np.uint8)
        for s, t, n in wanted:
            expected[t : t + n] = shared_peer.content[s : s + n]
        assert read(shared_peer.address, wanted) == sum(n for *_, n in wanted)
        assert (view == expected).all()


@pytest.mark.parametrize(
    "span", [Span(SIZE, 0, 1), Span(0, SIZE - 1, 2), Span(-1, 0, 4), Span(0, -4, 4), Span(0, 0, -1)]
)
def test_spans_outside_are_refused_and_nothing_is_written(name: str, shared_peer: Peer, span: Span) -> None:
    with opened(name) as (view, read):
        with pytest.raises(TransferError):
            read(shared_peer.address, [Span(0, 0, 64), span])
        assert not view.any()


def test_a_peer_killed_before_the_first_read(name: str) -> None:
    with opened(name) as (_, read), peer(name) as found:
        found.process.kill()
        found.process.wait()
        with pytest.raises(TransferError):
            read(found.address, [Span(0, 0, 64)])


def test_a_peer_killed_between_reads_gives_old_bytes_or_an_error(name: str) -> None:
    """Which of the two is the transport's affair: COMMIT decides whether bytes may be used."""
    with opened(name) as (view, read), peer(name) as found:
        read(found.address, [Span(0, 0, 64)])
        found.process.kill()
        found.process.wait()
        try:
            read(found.address, [Span(64, 64, 64)])
        except TransferError:
            return
        assert (view[:128] == found.content[:128]).all()


def test_a_frozen_peer_does_not_freeze_us(name: str) -> None:
    with opened(name) as (view, read), peer(name) as found:
        os.kill(found.process.pid, signal.SIGSTOP)
        try:
            read(found.address, [Span(0, 0, 4096)])
        except TransferError:
            return
        assert (view[:4096] == found.content[:4096]).all()


def test_a_dead_peers_memory_is_let_go_of(name: str) -> None:
    kind = transport_kind(name)
    region = kind.allocate(SIZE, "0f")
    transport = kind.open_transport(region)
    with peer(name) as found:
        transport.read(found.address, SIZE, [Span(0, 0, 64)])
        transport.prune()
        assert _mapped("pdctl-kv-a1"), "a living peer stays mapped"
    transport.prune()
    assert not _mapped("pdctl-kv-a1")
    transport.close()
    region.close()


def _mapped(label: str) -> bool:
    return label in Path("/proc/self/maps").read_text()


def test_another_epoch_at_the_same_place_is_refused(name: str) -> None:
    with opened(name) as (_, read), peer(name, "b2") as found:
        stale = found.address.replace("b2", "a1")
        with pytest.raises(TransferError):
            read(stale, [Span(0, 0, 64)])


def test_two_peers_on_one_host_do_not_mix(name: str, shared_peer: Peer) -> None:
    with opened(name) as (view, read), peer(name, "c3") as other:
        read(shared_peer.address, [Span(0, 0, 1000)])
        read(other.address, [Span(0, 1000, 1000)])
        assert (view[:1000] == shared_peer.content[:1000]).all()
        assert (view[1000:2000] == other.content[:1000]).all()


@pytest.mark.parametrize("address", ["", "x", "1/2", "999999999/3/a1", "-1/-1/a1", "1/2/3/4"])
def test_nonsense_addresses_are_refused(name: str, address: str) -> None:
    with opened(name) as (_, read), pytest.raises(TransferError):
        read(address, [Span(0, 0, 64)])
