"""Transfer of KV bytes from a peer's pool into this engine's. One file per transport, all behind one protocol.

A transport serves one block of memory and reads from peers into it. A read has moved every byte, or has failed and is
known to be over (TransferError), or may not be over (TransferUncertain): then its target must not be reused until
`settled` returns true."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from pdctl.engine.cache.layout import Span
from pdctl.engine.cache.memory import DeviceMemory, Memory
from pdctl.host.devices.rdma import active_devices
from pdctl.net import LOOPBACK


class TransferError(Exception):
    """The bytes did not arrive, and nothing will write to the target any more."""


class DeviceMemoryRefused(TransferError):
    """The transport does not read and write this GPU's memory; it can use a copy in host memory."""


class TransferUncertain(TransferError):
    """The bytes did not arrive in time and may still arrive. `settled` is polled until it returns true."""

    def __init__(self, message: str, settled: Callable[[], bool]) -> None:
        super().__init__(message)
        self.settled = settled


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a transport.

    `host`: this engine's address for peers. `protocol`: "tcp", "rdma", or "auto" for RDMA if a device is up.
    `devices`: RDMA devices to use, all when empty. `ports`: first and last port to listen on, any when None.
    """

    epoch: str
    host: str = LOOPBACK
    protocol: str = "auto"
    devices: tuple[str, ...] = ()
    ports: tuple[int, int] | None = None
    serving: bool = True


class Transport(Protocol):
    """One backend on one memory. Reads may run in several threads at once.

    `address`: where peers read this memory, "" if it is not served. `protocol`: the actual network protocol.
    `fallback`: why it is not the requested one, or "".
    """

    name: str
    address: str
    protocol: str
    fallback: str

    def connect(self, address: str, peer_bytes: int) -> None:
        """Prepare to read from a peer's memory of `peer_bytes`. Raises TransferError."""
        ...

    def read(self, address: str, peer_bytes: int, spans: Sequence[Span], timeout_s: float) -> int:
        """Copy `spans` from the memory at `address`; returns bytes moved.

        Raises TransferError, and TransferUncertain if `timeout_s` has passed and bytes may still arrive.
        """
        ...

    def forget(self, address: str) -> None:
        """Release a peer that has been replaced by a newer epoch."""
        ...

    def prune(self) -> None:
        """Release resources of peers that have exited."""
        ...

    def close(self) -> None:
        """Stop serving and forget every peer."""
        ...


class Kind(Protocol):
    """The interface of a transport's module."""

    def open_transport(self, memory: Memory | DeviceMemory, settings: Settings) -> Transport:
        """Open a transport over `memory`, on a GPU for those transports that read there.

        Raises TransferError with the reason if it cannot work here, DeviceMemoryRefused if it could in host memory."""
        ...


def transport_kind(name: str) -> Kind:
    """Import the module of a known transport."""
    return cast(Kind, importlib.import_module(f"pdctl.engine.transfer.{name}"))


def carrier(settings: Settings, plain: str) -> tuple[str, str]:
    """("rdma" or `plain`, why it is not the requested one). Checked here because libraries silently fall back to
    TCP."""
    devices = active_devices()
    missing = [name for name in settings.devices if name not in devices]
    if settings.protocol == "tcp":
        return "tcp", ""
    if missing:
        return plain, f"RDMA is configured over {', '.join(missing)}, which is not active on this machine"
    if not devices:
        asked = settings.protocol == "rdma"
        return plain, "RDMA is configured, but no RDMA device is active on this machine" if asked else ""
    return "rdma", ""


def check_spans(spans: Sequence[Span], peer_bytes: int, our_bytes: int) -> int:
    """The bytes in `spans`. Raises TransferError for one that is malformed or outside either memory."""
    total = 0
    for source, target, length in spans:
        if length < 0 or source < 0 or target < 0 or source + length > peer_bytes or target + length > our_bytes:
            raise TransferError(f"span {source}:{target}:{length} is malformed or lies outside the pools")
        total += length
    return total
