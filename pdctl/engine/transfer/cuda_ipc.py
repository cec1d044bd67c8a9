"""Same host, pools in the memory of GPUs: a peer's pool is mapped, and blocks are copied from GPU to GPU.

The address contains the handle of the peer's allocation, and a descriptor of the peer: an empty file labelled with the
epoch, as shared memory has it. It tells whether the peer still lives, so that a dead one's memory is not kept.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pdctl.engine.cache.layout import Span
from pdctl.engine.cache.memory import LABEL, DeviceMemory, Memory
from pdctl.engine.transfer import Settings, TransferError, TransferUncertain, check_spans
from pdctl.engine.transfer.cuda_runtime import HANDLE_BYTES, CudaError, CudaRuntime, Rows
from pdctl.engine.transfer.shm import is_alive

# Between two looks at a copy on its way, seconds.
_POLL_S = 50e-6
_MOST_PITCH = 2**31

_log = logging.getLogger(__name__)


def open_transport(memory: Memory | DeviceMemory, settings: Settings) -> CudaIpcTransport:
    """See Kind.open_transport."""
    try:
        return CudaIpcTransport(memory, settings)
    except CudaError as failure:
        raise TransferError(f"this engine's KV cannot be mapped by others: {failure}") from failure


class _Mapped(NamedTuple):
    """A peer's pool here: its address, its size, and the address to unmap."""

    base: int
    num_bytes: int
    mapping: int


class Planes(NamedTuple):
    """How often a span occurs, and the distances in bytes."""

    number: int
    source_pitch: int = 0
    target_pitch: int = 0


def columns(spans: Sequence[Span]) -> Iterator[tuple[Span, Planes]]:
    """The same spans, together where a run of blocks occurs in each of many equal planes: then one copy moves it for
    all layers. Empty spans are left out."""
    table = np.array([span for span in spans if span.length], dtype=np.int64).reshape(-1, 3)
    if not len(table):
        return
    # The planes follow each other, each with all runs: the number of runs divides that of spans.
    for runs in (count for count in range(1, len(table) // 2 + 1) if not len(table) % count):
        by_plane = table.reshape(-1, runs, 3)
        steps = np.diff(by_plane, axis=0)
        source_pitch, target_pitch, grown = steps[0, 0].tolist()
        widest = int(table[:, 2].max())
        fits = widest <= min(source_pitch, target_pitch) and max(source_pitch, target_pitch) < _MOST_PITCH
        if fits and not grown and (steps == steps[0, 0]).all():
            planes = Planes(len(by_plane), source_pitch, target_pitch)
            yield from ((Span(*run), planes) for run in by_plane[0].tolist())
            return
    yield from ((Span(*span), Planes(1)) for span in table.tolist())


class CudaIpcTransport:
    """Maps each peer's pool once. `address` is PID/DESCRIPTOR/EPOCH/OFFSET/HANDLE of the owner."""

    name = "cuda_ipc"
    protocol = "cuda_ipc"
    fallback = ""

    def __init__(self, memory: Memory | DeviceMemory, settings: Settings) -> None:
        self._cuda = CudaRuntime()
        self._target = memory
        self._device = memory.device if isinstance(memory, DeviceMemory) else 0
        self._peers: dict[str, _Mapped] = {}
        self._readers: dict[str, int] = {}
        self._streams: list[int] = []
        self._lock = threading.Lock()
        self._life = -1
        self.address = ""
        if settings.serving:
            # Only the process that has allocated memory can export it.
            given = memory.place if isinstance(memory, DeviceMemory) else ""
            place = given or self._cuda.place(memory.base)
            self._life = os.memfd_create(LABEL + settings.epoch)
            self.address = f"{os.getpid()}/{self._life}/{settings.epoch}/{place}"

    def connect(self, address: str, peer_bytes: int) -> None:
        """See Transport.connect."""
        self._use(address, peer_bytes)
        self._leave(address)

    def read(self, address: str, peer_bytes: int, spans: Sequence[Span], timeout_s: float) -> int:
        """See Transport.read. The peer's process takes no part in a copy."""
        peer = self._use(address, peer_bytes)
        try:
            total = check_spans(spans, peer.num_bytes, self._target.num_bytes)
            stream = self._take_stream()
        except TransferError:
            self._leave(address)
            raise
        deadline = time.monotonic() + timeout_s
        failure = self._copied(peer, spans, stream, deadline)
        if failure is None and not self._is_over(stream):
            raise TransferUncertain("the copy between GPUs is late", self._late(address, stream))
        self._settled(address, stream)
        if failure is not None:
            raise TransferError(f"the copy between GPUs failed: {failure}")
        return total

    def prune(self) -> None:
        """See Transport.prune."""
        with self._lock:
            dead = [address for address in self._peers if not is_alive(address)]
        for address in dead:
            self.forget(address)

    def forget(self, address: str) -> None:
        """See Transport.forget. A peer that is being read from is kept until `prune` finds it unused."""
        with self._lock:
            peer = None if self._readers.get(address) else self._peers.pop(address, None)
        if peer is not None:
            self._unmap(peer)

    def close(self) -> None:
        """See Transport.close."""
        for address in list(self._peers):
            self.forget(address)
        with self._lock:
            streams, self._streams = self._streams, []
            if self._life >= 0:
                os.close(self._life)
                self._life = -1
        for stream in streams:
            self._cuda.destroy_stream(stream)

    def _use(self, address: str, peer_bytes: int) -> _Mapped:
        """The peer's pool, mapped until `_leave`. Raises TransferError."""
        with self._lock:
            try:
                self._cuda.set_device(self._device)
                if address not in self._peers:
                    self._peers[address] = self._map(address, peer_bytes)
            except CudaError as failure:
                raise TransferError(f"the peer's KV cannot be mapped: {failure}") from failure
            self._readers[address] = self._readers.get(address, 0) + 1
            return self._peers[address]

    def _leave(self, address: str) -> None:
        with self._lock:
            self._readers[address] -= 1
            if not self._readers[address]:
                del self._readers[address]

    def _map(self, address: str, peer_bytes: int) -> _Mapped:
        try:
            *_, offset_word, handle_word = address.split("/")
            offset, handle = int(offset_word), bytes.fromhex(handle_word)
        except ValueError as failure:
            raise TransferError(f"the peer's address {address!r} is malformed") from failure
        if address.count("/") != 4 or offset < 0 or len(handle) != HANDLE_BYTES or not is_alive(address):
            raise TransferError(f"the peer at {address[:40]!r} is gone, or has another epoch")
        mapping = self._cuda.map(handle)
        base, size = self._cuda.allocation(mapping)
        if base + size < mapping + offset + peer_bytes:
            self._cuda.unmap(mapping)
            raise TransferError(f"the peer's memory is smaller than the {peer_bytes} bytes it announced")
        return _Mapped(mapping + offset, peer_bytes, mapping)

    def _unmap(self, peer: _Mapped) -> None:
        try:
            self._cuda.set_device(self._device)
            self._cuda.unmap(peer.mapping)
        except CudaError as failure:
            _log.warning("a peer's KV cannot be unmapped: %s", failure)

    def _copied(self, peer: _Mapped, spans: Sequence[Span], stream: int, deadline: float) -> CudaError | None:
        """Queue the copies and wait for them, until the deadline at most."""
        try:
            for (source, target, length), planes in columns(spans):
                ours, theirs = self._target.base + target, peer.base + source
                if planes.number == 1:
                    self._cuda.copy(ours, theirs, length, stream)
                else:
                    to, from_ = Rows(ours, planes.target_pitch), Rows(theirs, planes.source_pitch)
                    self._cuda.copy_rows(to, from_, length, planes.number, stream)
            while not self._cuda.is_done(stream) and time.monotonic() < deadline:
                time.sleep(_POLL_S)
        except CudaError as failure:
            return failure
        return None

    def _is_over(self, stream: int) -> bool:
        try:
            return self._cuda.is_done(stream)
        except CudaError:
            return True  # an error of the device: nothing runs there any more

    def _late(self, address: str, stream: int) -> Callable[[], bool]:
        """For TransferUncertain. The peer stays mapped, and the stream in use, until it is over."""
        over = False

        def settled() -> bool:
            nonlocal over
            over = over or self._settled(address, stream)
            return over

        return settled

    def _settled(self, address: str, stream: int) -> bool:
        if not self._is_over(stream):
            return False
        with self._lock:
            self._streams.append(stream)
        self._leave(address)
        return True

    def _take_stream(self) -> int:
        with self._lock:
            if self._streams:
                return self._streams.pop()
        try:
            return self._cuda.create_stream()
        except CudaError as failure:
            raise TransferError(str(failure)) from failure
