"""How KV bytes get from a peer's pool into ours. One file per transport, all behind one protocol.

A transport serves one block of memory and reads from peers into it. A read either moved every byte, or moved what it
moved and is known to be over (TransferError), or cannot be said to be over (TransferUncertain): then its target must
not be used for anything else until `settled` says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from pdctl.engine.cache.layout import Span
from pdctl.engine.cache.memory import Memory
from pdctl.host.rdma import active_devices

TRANSPORTS = ("shm", "mooncake", "nixl")


class TransferError(Exception):
    """The bytes did not arrive, and nothing will write to the target any more."""


class TransferUncertain(TransferError):
    """The bytes did not arrive in time and may still land. `settled` is asked until it says that they cannot."""

    def __init__(self, message: str, settled: Callable[[], bool]) -> None:
        super().__init__(message)
        self.settled = settled


@dataclass(frozen=True, slots=True)
class Settings:
    """What a transport is opened with.

    `host`: the address at which peers reach us. `protocol`: "tcp", "rdma", or "auto" for RDMA where a device is up.
    `devices`: RDMA devices to use, all when empty. `ports`: first and last port to listen on, any when None.
    """

    epoch: str
    host: str = "127.0.0.1"
    protocol: str = "auto"
    devices: tuple[str, ...] = ()
    ports: tuple[int, int] | None = None
    serving: bool = True


class Transport(Protocol):
    """One backend at work on one memory. Reads may run in several threads at once.

    `address`: where peers read our memory, "" when we do not serve. `protocol`: what carries the bytes.
    `fallback`: why that is not what was asked for, or "".
    """

    name: str
    address: str
    protocol: str
    fallback: str

    def connect(self, address: str, peer_bytes: int) -> None:
        """Make ready to read from a peer's memory of `peer_bytes`. Raises TransferError."""
        ...

    def read(self, address: str, peer_bytes: int, spans: Sequence[Span], timeout_s: float) -> int:
        """Copy `spans` from the memory at `address`; returns bytes moved.

        Raises TransferError, and TransferUncertain when `timeout_s` passed with bytes still under way.
        """
        ...

    def forget(self, address: str) -> None:
        """Let go of a peer that has been replaced by another epoch of it."""
        ...

    def prune(self) -> None:
        """Let go of what belongs to peers that have ended."""
        ...

    def close(self) -> None:
        """Stop serving and forget every peer."""
        ...


class Kind(Protocol):
    """What a transport's module offers."""

    def open_transport(self, memory: Memory, settings: Settings) -> Transport:
        """A transport over `memory`. Raises TransferError with a sentence when it cannot work here."""
        ...


def transport_kind(name: str) -> Kind:
    """The module of a known transport, loaded now."""
    return cast(Kind, importlib.import_module(f"pdctl.engine.transfer.{name}"))


def carrier(settings: Settings, plain: str) -> tuple[str, str]:
    """("rdma" or `plain`, why it is not what was asked for). Libraries fall back to TCP without a word."""
    devices = active_devices()
    missing = [name for name in settings.devices if name not in devices]
    if settings.protocol == "tcp":
        return "tcp", ""
    if missing:
        return plain, f"RDMA was asked for over {', '.join(missing)}, which is not up here"
    if not devices:
        asked = settings.protocol == "rdma"
        return plain, "RDMA was asked for and no RDMA device is up here" if asked else ""
    return "rdma", ""


def check_spans(spans: Sequence[Span], peer_bytes: int, our_bytes: int) -> int:
    """The bytes in `spans`. Raises TransferError for one that is malformed or outside either memory."""
    total = 0
    for source, target, length in spans:
        if length < 0 or source < 0 or target < 0 or source + length > peer_bytes or target + length > our_bytes:
            raise TransferError(f"span {source}:{target}:{length} is malformed or lies outside the pools")
        total += length
    return total
