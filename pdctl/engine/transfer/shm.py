"""Same host: the pool lives in an anonymous memory file; a peer maps it and copies once.

A memory file has no name that could be left behind: it is gone with the last process that maps it. The address
names its owner's descriptor and the epoch is part of the file's label, so a number reused by another process or by
a restarted engine is refused.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pdctl.engine.layout import Span
from pdctl.engine.transfer import Region, TransferError

_MADV_POPULATE_WRITE = 23  # linux/mman.h, since 5.14
_LABEL = "pdctl-kv-"

_Bytes = npt.NDArray[np.uint8]


class ShmRegion:
    """`address` is PID/DESCRIPTOR/EPOCH of the owner. The descriptor lives as long as this object."""

    def __init__(self, fd: int, epoch: str, mapped: mmap.mmap) -> None:
        self.address = f"{os.getpid()}/{fd}/{epoch}"
        self.view = memoryview(mapped)
        self.close = weakref.finalize(self, os.close, fd)


def allocate(num_bytes: int, epoch: str) -> ShmRegion:
    """Zeroed shared memory, its pages present. Raises TransferError when the machine has too little."""
    fd = os.memfd_create(_LABEL + epoch)
    try:
        os.ftruncate(fd, num_bytes)
        mapped = mmap.mmap(fd, num_bytes)
    except (OSError, ValueError) as failure:
        os.close(fd)
        raise TransferError(f"no shared memory of {num_bytes / 2**30:.2f} GiB: {failure}") from failure
    _populate(mapped, num_bytes)
    return ShmRegion(fd, epoch, mapped)


def open_transport(region: Region) -> ShmTransport:
    """See Kind.open_transport."""
    return ShmTransport(region)


class ShmTransport:
    """Maps each peer's pool once, read-only."""

    name = "shm"

    def __init__(self, region: Region) -> None:
        self._target = np.frombuffer(region.view, dtype=np.uint8)
        self._peers: dict[str, _Bytes] = {}

    def read(self, address: str, peer_bytes: int, spans: list[Span]) -> int:
        """See Transport.read."""
        peer = self._peer(address, peer_bytes)
        for span in spans:
            if span.length < 0 or min(span.source, span.target) < 0:
                raise TransferError(f"span {span} is malformed")
            if span.source + span.length > len(peer) or span.target + span.length > len(self._target):
                raise TransferError(f"span {span} lies outside the pools")
        for source, target, length in spans:
            self._target[target : target + length] = peer[source : source + length]
        return sum(span.length for span in spans)

    def prune(self) -> None:
        """See Transport.prune. A mapping keeps the memory of a dead peer's whole pool."""
        self._peers = {address: view for address, view in self._peers.items() if _alive(address)}

    def close(self) -> None:
        """See Transport.close."""
        self._peers.clear()

    def _peer(self, address: str, peer_bytes: int) -> _Bytes:
        if address not in self._peers:
            self.prune()
            self._peers[address] = _map_peer(address, peer_bytes)
        return self._peers[address]


def _alive(address: str) -> bool:
    """Whether the owner still has the very file: a reused pid has another one."""
    pid, fd, epoch = address.split("/")
    try:
        return f"{_LABEL}{epoch}" in str(Path(f"/proc/{pid}/fd/{fd}").readlink())
    except OSError:
        return False


def _map_peer(address: str, peer_bytes: int) -> _Bytes:
    try:
        pid, fd, epoch = address.split("/")
        source = os.open(f"/proc/{int(pid)}/fd/{int(fd)}", os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError) as failure:
        raise TransferError(f"the peer's memory {address!r} cannot be opened: {failure}") from failure
    try:
        label = str(Path(f"/proc/self/fd/{source}").readlink())
        if f"{_LABEL}{epoch}" not in label:
            raise TransferError(f"the peer's memory is {label!r}, not that of epoch {epoch}")
        if os.fstat(source).st_size < peer_bytes:
            raise TransferError(f"the peer's memory is smaller than the {peer_bytes} bytes it announced")
        mapped = mmap.mmap(source, peer_bytes, prot=mmap.PROT_READ)
    except OSError as failure:
        raise TransferError(f"the peer's memory {address!r} cannot be mapped: {failure}") from failure
    finally:
        os.close(source)
    # Not populated: mapping a whole pool's pages takes 90 ms per GiB, and the kernel maps 16 at a fault anyway.
    return np.frombuffer(mapped, dtype=np.uint8)


def _populate(mapped: mmap.mmap, num_bytes: int) -> None:
    """Make the pages now: zeroing them during the first transfers would triple their time."""
    address = np.frombuffer(mapped, dtype=np.uint8).ctypes.data
    with contextlib.suppress(OSError):  # older kernels: pages come as they are touched
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), ctypes.c_int(_MADV_POPULATE_WRITE))
