"""How KV bytes get from a peer's pool into ours. One file per transport, all behind one protocol."""

from __future__ import annotations

import importlib
from typing import Protocol, cast

from pdctl.engine.layout import Span

TRANSPORTS = ("shm",)


class TransferError(Exception):
    """The bytes did not arrive, and nothing will write to the target any more."""


class Region(Protocol):
    """Memory that a pool lives in and a transport can serve from and write to."""

    address: str
    view: memoryview

    def close(self) -> object:
        """Stop serving it; peers that have mapped it keep what they have."""
        ...


class Transport(Protocol):
    """Reads from peers into one region. Used from the transfer thread only."""

    name: str

    def read(self, address: str, peer_bytes: int, spans: list[Span]) -> int:
        """Copy `spans` from the pool at `address` (of `peer_bytes`); returns bytes moved.

        Raises TransferError, after which no copy is under way.
        """
        ...

    def prune(self) -> None:
        """Let go of what belongs to peers that have ended."""
        ...

    def close(self) -> None:
        """Forget every peer."""
        ...


class Kind(Protocol):
    """What a transport's module offers."""

    def allocate(self, num_bytes: int, epoch: str) -> Region:
        """Memory this transport can serve."""
        ...

    def open_transport(self, region: Region) -> Transport:
        """A transport that writes into `region`."""
        ...


def choose(backend: str) -> str:
    """The transport behind `auto`. One exists so far; more are chosen by where the peers are."""
    return "shm" if backend == "auto" else backend


def transport_kind(name: str) -> Kind:
    """The module of a known transport, loaded now."""
    return cast(Kind, importlib.import_module(f"pdctl.engine.transfer.{name}"))
