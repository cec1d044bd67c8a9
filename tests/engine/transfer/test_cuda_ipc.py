"""The transport cuda_ipc beyond the contract of all transports (tests/contracts), over a stand-in of CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pdctl.engine.cache.layout import Span
from pdctl.engine.cache.memory import DeviceMemory, Memory
from pdctl.engine.transfer import Settings, TransferError, TransferUncertain, cuda_runtime
from pdctl.engine.transfer.cuda_ipc import CudaIpcTransport, open_transport
from pdctl.engine.transfer.cuda_runtime import CudaError, CudaRuntime
from tests.contracts.test_transfer import SIZE, Peer, _mapped, peer
from tests.fakes import cudart

pytestmark = pytest.mark.skipif(bool(cudart.NO_COMPILER), reason=cudart.NO_COMPILER)


@pytest.fixture
def memory() -> Iterator[Memory]:
    cudart.load()
    made = Memory(SIZE, "0f")
    yield made
    made.close()


@pytest.fixture
def ours(memory: Memory) -> Iterator[CudaIpcTransport]:
    transport = open_transport(memory, Settings("0f", serving=False))
    yield transport
    transport.close()


@pytest.fixture(scope="module")
def theirs() -> Iterator[Peer]:
    with peer("cuda_ipc", "a7") as found:
        yield found


def test_a_late_copy_is_uncertain_until_the_stream_is_done(
    ours: CudaIpcTransport, theirs: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "slow"
    slow.touch()
    monkeypatch.setenv("FAKE_GPU_SLOW", str(slow))
    with pytest.raises(TransferUncertain, match="late") as late:
        ours.read(theirs.address, SIZE, [Span(0, 0, 64)], 0.01)
    assert not late.value.settled()
    ours.forget(theirs.address)
    assert _mapped("pdctl-kv-a7"), "its source is still being read"
    slow.unlink()
    assert late.value.settled()
    assert late.value.settled(), "asking again changes nothing"
    ours.forget(theirs.address)
    assert not _mapped("pdctl-kv-a7")
    assert ours.read(theirs.address, SIZE, [Span(0, 0, 64)], 1) == 64


def test_a_pool_that_is_smaller_than_announced_is_refused(ours: CudaIpcTransport, theirs: Peer) -> None:
    with pytest.raises(TransferError, match="smaller than"):
        ours.connect(theirs.address, SIZE + 4097)
    assert not _mapped("pdctl-kv-a7")
    ours.connect(theirs.address, SIZE)


@pytest.mark.parametrize("change", ["epoch", "handle", "short", "offset", "descriptor"])
def test_a_changed_address_is_refused(ours: CudaIpcTransport, theirs: Peer, change: str) -> None:
    pid, life, epoch, offset, handle = theirs.address.split("/")
    words = {
        "epoch": [pid, life, "a8", offset, handle],
        "handle": [pid, life, epoch, offset, "00" * 64],
        "short": [pid, life, epoch, offset, handle[2:]],
        "offset": [pid, life, epoch, "-1", handle],
        "descriptor": [pid, "0", epoch, offset, handle],
    }[change]
    with pytest.raises(TransferError):
        ours.connect("/".join(words), SIZE)


def test_memory_that_is_not_on_a_gpu_is_refused_with_the_reason() -> None:
    cudart.load()
    with pytest.raises(TransferError, match="cannot be mapped by others: cuMemGetAddressRange"):
        open_transport(DeviceMemory(4096, SIZE, 0), Settings("0f"))


def test_a_process_without_cuda_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "maps"
    empty.write_text("7f00-7f01 r-xp 0 00:00 1 /usr/lib/libc.so.6\n")
    monkeypatch.setattr(cuda_runtime, "_MAPS", empty)
    with pytest.raises(CudaError, match="does not use a GPU"):
        CudaRuntime()
