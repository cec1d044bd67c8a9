"""The transport cuda_ipc beyond the contract of all transports (tests/contracts), over a stand-in of CUDA."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pdctl.engine.cache.layout import Half, Span, block_bytes, spans
from pdctl.engine.cache.memory import DeviceMemory, Memory
from pdctl.engine.transfer import Settings, TransferError, TransferUncertain, cuda_runtime
from pdctl.engine.transfer.cuda_ipc import CudaIpcTransport, Planes, columns, open_transport
from pdctl.engine.transfer.cuda_runtime import CudaError, CudaRuntime
from pdctl.wire import LayerShape, Manifest
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


@pytest.mark.parametrize("seed", range(8))
def test_spans_of_equal_planes_are_copied_together_and_all_others_one_by_one(seed: int) -> None:
    chance = random.Random(seed)
    odd = [LayerShape(1, 16, 8), LayerShape(2, 8, 4), LayerShape(1, 4, 4)]
    shapes = [LayerShape(2, 8, 8)] * chance.randint(1, 6) if seed % 2 else odd
    manifests = [Manifest("m", "float32", size, shapes) for size in chance.choices((2, 4, 8), k=2)]
    sizes = [chance.randint(30, 60) for _ in manifests]
    halves = [
        Half(manifest, count, chance.sample(range(count), 64 // manifest.block_size))
        for manifest, count in zip(manifests, [max(size, 64) for size in sizes], strict=True)
    ]
    wanted = spans(halves[0], halves[1], chance.randint(0, 9), chance.randint(1, 50))
    found: list[Span] = []
    for (source, target, length), planes in columns(wanted):
        for row in range(planes.number):
            found.append(Span(source + row * planes.source_pitch, target + row * planes.target_pitch, length))
    assert sorted(found) == sorted(wanted)
    together = len(list(columns(wanted)))
    assert together == (len(wanted) // (2 * len(shapes)) if seed % 2 else len(wanted))


def test_a_hand_over_of_many_layers_arrives(ours: CudaIpcTransport, theirs: Peer, memory: Memory) -> None:
    manifest = Manifest("m", "float32", 4, [LayerShape(2, 8, 8)] * 8)
    count = SIZE // block_bytes(manifest)
    source, target = (Half(manifest, count, random.Random(n).sample(range(count), 20)) for n in range(2))
    wanted = spans(source, target, 3, 70)
    assert ours.read(theirs.address, SIZE, wanted, 5) == sum(span.length for span in wanted)
    expected = np.zeros(SIZE, dtype=np.uint8)
    for from_, to, length in wanted:
        expected[to : to + length] = theirs.content[from_ : from_ + length]
    assert (memory.bytes == expected).all()


@pytest.mark.parametrize("wanted", [[], [Span(0, 0, 0)], [Span(5, 9, 3)], [Span(0, 0, 4), Span(2, 8, 4)]])
def test_few_spans(wanted: list[Span]) -> None:
    assert [span for span, planes in columns(wanted) if planes == Planes(1)] == [s for s in wanted if s.length]


def test_planes_that_are_too_far_apart_for_one_copy() -> None:
    far = [Span(0, 0, 8), Span(2**31, 64, 8)]
    assert [planes.number for _, planes in columns(far)] == [1, 1]


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
