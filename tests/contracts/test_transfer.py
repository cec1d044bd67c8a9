"""The contract of transports, tested for each of them with real peers in separate processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdctl.engine.cache.layout import Span
from pdctl.engine.cache.memory import Memory
from pdctl.engine.transfer import Settings, TransferError, TransferUncertain, Transport, transport_kind
from pdctl.transports import TRANSPORTS
from tests.fakes import cudart
from tests.service import wait_until

SIZE = 4 * 2**20
BIG = 192 * 2**20

# A peer that serves random bytes. With a port range, a restarted one gets the ports of its predecessor.
_PEER = """
import sys, numpy as np
from tests.fakes import cudart
if sys.argv[1] == "cuda_ipc":
    cudart.load()
from pdctl.engine.transfer import Settings, transport_kind
from pdctl.engine.cache.memory import Memory
name, epoch, size, ports = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
memory = Memory(size, epoch)
memory.bytes[:] = np.random.default_rng(int(epoch, 16)).integers(0, 256, size, dtype=np.uint8)
ports = tuple(map(int, ports.split("-"))) if ports else None
transport = transport_kind(name).open_transport(memory, Settings(epoch, ports=ports))
print("ADDRESS", transport.address, flush=True)
sys.stdin.read()
"""


@dataclass
class Peer:
    address: str
    process: subprocess.Popen[str]
    content: np.ndarray

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def peer(transport: str, epoch: str = "a1", size: int = SIZE, ports: str = "") -> Iterator[Peer]:
    process = subprocess.Popen(
        [sys.executable, "-c", _PEER, transport, epoch, str(size), ports],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = ""
        while not line.startswith("ADDRESS"):
            line = process.stdout.readline()
            assert line, "the peer ended"
        content = np.random.default_rng(int(epoch, 16)).integers(0, 256, size, dtype=np.uint8)
        yield Peer(line.split()[1], process, content)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.fixture(params=tuple(TRANSPORTS), scope="module")
def name(request: pytest.FixtureRequest) -> str:
    """Each transport that works here; others are skipped with the reason."""
    if request.param == "cuda_ipc":
        if cudart.NO_COMPILER:
            pytest.skip(cudart.NO_COMPILER)
        cudart.load()
    memory = Memory(4096, "ff")
    try:
        transport_kind(request.param).open_transport(memory, Settings("ff")).close()
    except TransferError as failure:
        pytest.skip(f"NOT TESTED: {failure}")
    finally:
        memory.close()
    return str(request.param)


@pytest.fixture(scope="module")
def shared_peer(name: str) -> Iterator[Peer]:
    with peer(name) as found:
        yield found


@dataclass
class Ours:
    """The reader's side: memory, transport, and a read with the sizes filled in."""

    view: np.ndarray
    transport: Transport
    size: int

    def read(self, address: str, spans: list[Span], timeout_s: float = 20.0) -> int:
        return self.transport.read(address, self.size, spans, timeout_s)


@contextmanager
def opened(name: str, size: int = SIZE) -> Iterator[Ours]:
    memory = Memory(size, "0f")
    transport = transport_kind(name).open_transport(memory, Settings("0f", serving=False))
    try:
        yield Ours(memory.bytes, transport, size)
    finally:
        transport.close()
        memory.close()


@pytest.fixture(scope="module")
def ours(name: str) -> Iterator[Ours]:
    with opened(name) as found:
        yield found


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    spans=st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(0, SIZE - 1), st.integers(0, 70_000)), max_size=12)
)
def test_bytes_arrive_as_they_were(ours: Ours, shared_peer: Peer, spans: list[tuple[int, int, int]]) -> None:
    wanted, taken = [], np.zeros(SIZE, dtype=bool)
    for s, t, n in spans:
        n = min(n, SIZE - s, SIZE - t)
        if not taken[t : t + n].any():  # targets of one read never overlap: blocks have one owner
            taken[t : t + n] = True
            wanted.append(Span(s, t, n))
    ours.view[:] = 0
    expected = np.zeros(SIZE, dtype=np.uint8)
    for s, t, n in wanted:
        expected[t : t + n] = shared_peer.content[s : s + n]
    assert ours.read(shared_peer.address, wanted) == sum(n for *_, n in wanted)
    assert (ours.view == expected).all()


def test_five_thousand_spans_in_one_read(ours: Ours, shared_peer: Peer) -> None:
    """More pieces than mooncake's default queue limits."""
    order = np.random.default_rng(3).permutation(5000)
    spans = [Span(int(s) * 512, t * 512, 512) for t, s in enumerate(order)]
    assert ours.read(shared_peer.address, spans) == 5000 * 512
    for s, t, n in spans[::97]:
        assert (ours.view[t : t + n] == shared_peer.content[s : s + n]).all()


@pytest.mark.parametrize(
    "span", [Span(SIZE, 0, 1), Span(0, SIZE - 1, 2), Span(-1, 0, 4), Span(0, -4, 4), Span(0, 0, -1)]
)
def test_spans_outside_are_refused_and_nothing_is_written(ours: Ours, shared_peer: Peer, span: Span) -> None:
    ours.view[:] = 0
    with pytest.raises(TransferError):
        ours.read(shared_peer.address, [Span(0, 0, 64), span])
    assert not ours.view.any()


def test_a_peer_killed_before_the_first_read(name: str) -> None:
    with opened(name) as ours, peer(name) as found:
        found.kill()
        with pytest.raises(TransferError):
            ours.read(found.address, [Span(0, 0, 64)])


def test_a_peer_killed_between_reads_gives_old_bytes_or_an_error(name: str) -> None:
    """Either outcome is allowed: COMMIT decides whether bytes may be used."""
    with opened(name) as ours, peer(name) as found:
        ours.read(found.address, [Span(0, 0, 64)])
        found.kill()
        try:
            ours.read(found.address, [Span(64, 64, 64)])
        except TransferError:
            return
        assert (ours.view[:128] == found.content[:128]).all()


def test_a_peer_killed_during_a_read_ends_it(name: str) -> None:
    with opened(name, BIG) as ours, peer(name, size=BIG) as found:
        ours.read(found.address, [Span(0, 0, 64)])
        reader, failure = _in_thread(ours, found, 60.0)
        found.kill()
        reader.join(30)
        assert not reader.is_alive(), "a dead peer must not be waited for"
        if not failure:  # the copy was faster than the kill
            assert (ours.view[:-4096] == found.content[:-4096]).all()
        assert not any(isinstance(f, TransferUncertain) for f in failure)


def test_a_frozen_peer_does_not_freeze_us_and_nothing_lands_after_it_is_settled(name: str) -> None:
    with opened(name, BIG) as ours, peer(name, size=BIG) as found:
        ours.read(found.address, [Span(0, 0, 64)])
        os.kill(found.process.pid, signal.SIGSTOP)
        ours.view[:] = 0
        try:
            ours.read(found.address, [Span(0, 0, BIG)], timeout_s=0.5)
        except TransferUncertain as late:
            os.kill(found.process.pid, signal.SIGCONT)
            wait_until(late.settled, what="the late read to be over")
            landed = ours.view.copy()
            ours.read(found.address, [Span(5, 5, 64)])  # another round trip: time for stray bytes
            landed[5:69] = ours.view[5:69]
            assert (ours.view == landed).all(), "bytes landed after the read was called over"
        except TransferError:
            pass
        else:
            assert (ours.view == found.content).all()


def test_one_frozen_peer_does_not_delay_another(name: str, shared_peer: Peer) -> None:
    with opened(name, BIG) as ours, peer(name, "d4", BIG) as frozen:
        ours.read(frozen.address, [Span(0, 0, 64)])
        os.kill(frozen.process.pid, signal.SIGSTOP)
        reader, _ = _in_thread(ours, frozen, 60.0)
        ours.transport.read(shared_peer.address, SIZE, [Span(0, BIG - 4096, 4096)], 10.0)
        assert (ours.view[-4096:] == shared_peer.content[:4096]).all()
        os.kill(frozen.process.pid, signal.SIGCONT)
        reader.join(60)
        assert not reader.is_alive()


def _in_thread(ours: Ours, found: Peer, timeout_s: float) -> tuple[threading.Thread, list[TransferError]]:
    """A read of (nearly) everything in a thread; it has started when this returns."""
    failure: list[TransferError] = []
    begun = threading.Event()

    def read() -> None:
        begun.set()
        try:
            ours.read(found.address, [Span(0, 0, BIG - 4096)], timeout_s)
        except TransferError as caught:
            failure.append(caught)

    reader = threading.Thread(target=read)
    reader.start()
    begun.wait(5)
    return reader, failure


def test_a_restarted_peer_is_told_from_its_predecessor(name: str) -> None:
    """Restart on the same ports, if the transport has any, four times, so that some ports are reused."""
    ports = f"{_free_range()}" if name == "mooncake" else ""
    with opened(name) as ours:
        with peer(name, "b2", ports=ports) as first:
            ours.read(first.address, [Span(0, 0, 64)])
        with peer(name, "b3", ports=ports) as second:
            stale = second.address.replace("b3", "b2")
            with pytest.raises(TransferError):
                ours.read(stale, [Span(0, 0, 64)])
            ours.read(second.address, [Span(0, 64, 64)])
            assert (ours.view[64:128] == second.content[:64]).all()


def _free_range() -> str:
    taken = {c.laddr.port for c in psutil.net_connections(kind="tcp") if c.laddr}
    first = next(p for p in range(21000, 30000, 10) if not taken & set(range(p, p + 10)))
    return f"{first}-{first + 9}"


def test_two_peers_on_one_host_do_not_mix(ours: Ours, name: str, shared_peer: Peer) -> None:
    with peer(name, "c3") as other:
        ours.read(shared_peer.address, [Span(0, 0, 1000)])
        ours.read(other.address, [Span(0, 1000, 1000)])
        assert (ours.view[:1000] == shared_peer.content[:1000]).all()
        assert (ours.view[1000:2000] == other.content[:1000]).all()


def test_four_threads_at_once(ours: Ours, shared_peer: Peer) -> None:
    ours.view[:] = 0
    quarter = SIZE // 4
    failures: list[Exception] = []

    def work(part: int) -> None:
        try:
            for round_ in range(8):
                start = part * quarter
                spans = [Span(start + i * 8192, start + i * 8192, 8192) for i in range(round_, quarter // 8192, 8)]
                ours.read(shared_peer.address, spans)
        except Exception as failure:  # noqa: BLE001 - shown by the test's own thread
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert (ours.view == shared_peer.content).all()


def test_a_serving_engine_reads_too(name: str, shared_peer: Peer) -> None:
    """A hybrid engine serves and reads."""
    memory = Memory(SIZE, "0e")
    transport = transport_kind(name).open_transport(memory, Settings("0e"))
    try:
        assert transport.address
        assert transport.read(shared_peer.address, SIZE, [Span(7, 9, 1000)], 10) == 1000
        assert (memory.bytes[9:1009] == shared_peer.content[7:1007]).all()
    finally:
        transport.close()
        memory.close()


def test_close_leaves_nothing(name: str) -> None:
    def listening() -> int:
        return sum(c.status == psutil.CONN_LISTEN for c in psutil.Process().net_connections(kind="tcp"))

    ports = listening()
    with peer(name, "e5") as found:
        with opened(name) as ours:
            ours.read(found.address, [Span(0, 0, 64)])
            ours.transport.prune()
            if name in ("shm", "cuda_ipc"):
                assert _mapped("pdctl-kv-e5"), "a living peer stays mapped"
            found.kill()
            ours.transport.prune()
            assert not _mapped("pdctl-kv-e5"), "a dead peer's memory is let go of"
        del ours
        # Its threads may end later, but the sockets must be gone.
        wait_until(lambda: listening() <= ports, what="listening ports to close")


def _mapped(label: str) -> bool:
    return label in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("address", ["", "x", "1/2", "999999999/3/a1", "-1/-1/a1", "1/2/3/4", "h:1/2/3/4", "1/a1/%%%"])
def test_nonsense_addresses_are_refused(ours: Ours, address: str) -> None:
    with pytest.raises(TransferError):
        ours.read(address, [Span(0, 0, 64)])
