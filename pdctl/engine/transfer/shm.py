"""Same host: a peer's memory file is mapped, and bytes are copied once.

The address contains the owner's descriptor, and the file's label contains the epoch, so a number reused by another
process or by a restarted engine is refused.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pdctl.engine.cache.layout import Span
from pdctl.engine.cache.memory import LABEL, Bytes, Memory
from pdctl.engine.transfer import Settings, TransferError, check_spans


def open_transport(memory: Memory, settings: Settings) -> ShmTransport:
    """See Kind.open_transport."""
    return ShmTransport(memory, settings)


class ShmTransport:
    """Maps each peer's pool once, read-only. `address` is PID/DESCRIPTOR/EPOCH of the owner."""

    name = "shm"
    protocol = "shm"
    fallback = ""

    def __init__(self, memory: Memory, settings: Settings) -> None:
        self.address = f"{os.getpid()}/{memory.fd}/{settings.epoch}" if settings.serving else ""
        self._target = memory.bytes
        self._peers: dict[str, Bytes] = {}
        self._lock = threading.Lock()

    def connect(self, address: str, peer_bytes: int) -> None:
        """See Transport.connect."""
        self._mapped(address, peer_bytes)

    def read(self, address: str, peer_bytes: int, spans: Sequence[Span], timeout_s: float) -> int:
        """See Transport.read. A copy of mapped memory does not depend on the peer, so it cannot be late."""
        peer = self._mapped(address, peer_bytes)
        total = check_spans(spans, len(peer), len(self._target))
        for source, target, length in spans:
            self._target[target : target + length] = peer[source : source + length]
        return total

    def prune(self) -> None:
        """See Transport.prune. A mapping keeps a dead peer's complete pool in memory."""
        with self._lock:
            self._drop_dead()

    def close(self) -> None:
        """See Transport.close."""
        with self._lock:
            self._peers.clear()

    def forget(self, address: str) -> None:
        """See Transport.forget."""
        with self._lock:
            self._peers.pop(address, None)

    def _mapped(self, address: str, peer_bytes: int) -> Bytes:
        with self._lock:
            if address not in self._peers:
                self._drop_dead()
                self._peers[address] = _map_peer(address, peer_bytes)
            return self._peers[address]

    def _drop_dead(self) -> None:
        self._peers = {address: view for address, view in self._peers.items() if is_alive(address)}


def is_alive(address: str) -> bool:
    """Whether the owner still has this file: a process with a reused pid has another one. More words may follow."""
    try:
        pid, fd, epoch = address.split("/")[:3]
        return f"{LABEL}{epoch}" in str(Path(f"/proc/{int(pid)}/fd/{int(fd)}").readlink())
    except (OSError, ValueError):
        return False


def _map_peer(address: str, peer_bytes: int) -> Bytes:
    try:
        pid, fd, epoch = address.split("/")
        source = os.open(f"/proc/{int(pid)}/fd/{int(fd)}", os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError) as failure:
        raise TransferError(f"the peer's memory {address!r} cannot be opened: {failure}") from failure
    try:
        label = str(Path(f"/proc/self/fd/{source}").readlink())
        if f"{LABEL}{epoch}" not in label:
            raise TransferError(f"the peer's memory is {label!r}, not that of epoch {epoch}")
        if os.fstat(source).st_size < peer_bytes:
            raise TransferError(f"the peer's memory is smaller than the {peer_bytes} bytes it announced")
        mapped = mmap.mmap(source, peer_bytes, prot=mmap.PROT_READ)
    except OSError as failure:
        raise TransferError(f"the peer's memory {address!r} cannot be mapped: {failure}") from failure
    finally:
        os.close(source)
    # Not populated: mapping all pages takes 90 ms per GiB, and the kernel maps 16 per page fault anyway.
    return np.frombuffer(mapped, dtype=np.uint8)
