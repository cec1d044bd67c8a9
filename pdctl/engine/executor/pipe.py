"""The messages between the first rank of an engine, which is its core, and the others: msgpack over sockets."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

import msgspec
import torch

from pdctl.engine.model.inputs import Shape
from pdctl.wire import LayerShape

# No message is larger; a longer one would be a broken stream.
_MOST_BYTES = 1 << 28
_LENGTH = struct.Struct("<I")


class Join(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Join the group, whose ranks meet at the file `rendezvous`, and load this rank's part of the model."""

    rendezvous: str


class Measure(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Compute the step that follows over a pool of `num_blocks` on this rank's GPU, and say what room it leaves."""

    num_blocks: int


class Pools(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The model is loaded everywhere: use a pool of `num_blocks`. `is_apart`: it is on this rank's GPU; otherwise its
    memory comes with this message."""

    num_blocks: int
    is_apart: bool


class Step(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Compute a step. `shape`, `data`: see InputBuffers.restage; `gives_back`: see Group."""

    shape: Shape
    data: bytes
    gives_back: bool


class Dense(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Compute `dense_logits`, for the check at load."""

    token_ids: list[int]
    implementation: str


class Leave(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The engine ends."""


ToRank = Join | Measure | Pools | Step | Dense | Leave


class Here(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The process runs."""


class Loaded(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Its part of the model is loaded. `how`: what must be equal on all ranks; `shapes`: the whole KV of its layers;
    `max_positions`: the longest sequence that these compute as the model says; `free`: bytes of its device."""

    how: tuple[str, ...]
    shapes: list[LayerShape]
    max_positions: int
    free: int


class Room(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Bytes of its GPU that are left for KV."""

    num_bytes: int


class Started(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """It has its pool, and follows. `place`: of a pool on its GPU, see DeviceMemory."""

    place: str = ""


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """It cannot serve, and a restart would not help."""

    reason: str


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """It ends. A restart may help."""

    reason: str


FromRank = Here | Loaded | Room | Started | Refused | Failed


class PipeClosed(Exception):
    """The other process has closed the socket, or does not take or send in time."""


class Received(NamedTuple):
    """A message's bytes, and the descriptor that came with it, if any."""

    data: bytes
    fd: int | None


class Pipe:
    """One end of a socket. One thread sends, one receives."""

    def __init__(self, end: socket.socket, timeout_s: float | None) -> None:
        self._socket = end
        self._socket.settimeout(timeout_s)
        self._encode = msgspec.msgpack.Encoder().encode

    def send(self, message: ToRank | FromRank, fd: int | None = None) -> None:
        """Send a message, and a descriptor with it. Raises PipeClosed."""
        data = self._encode(message)
        assert len(data) <= _MOST_BYTES
        try:
            if fd is None:
                self._socket.sendall(_LENGTH.pack(len(data)) + data)
            else:
                socket.send_fds(self._socket, [_LENGTH.pack(len(data))], [fd])
                self._socket.sendall(data)
        except OSError as failure:
            raise PipeClosed(str(failure)) from failure

    def receive(self) -> Received:
        """Wait for a message. Raises PipeClosed."""
        try:
            first, fds, _, _ = socket.recv_fds(self._socket, _LENGTH.size, 1)
            head = first + self._exactly(_LENGTH.size - len(first)) if first else b""
            if not head:
                raise PipeClosed("the other end is closed")
            (length,) = _LENGTH.unpack(head)
            if length > _MOST_BYTES:
                raise PipeClosed(f"a message of {length} bytes")
            return Received(self._exactly(length), fds[0] if fds else None)
        except OSError as failure:
            raise PipeClosed(str(failure)) from failure

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _exactly(self, count: int) -> bytes:
        found = bytearray(count)
        view, at = memoryview(found), 0
        while at < count:
            got = self._socket.recv_into(view[at:])
            if not got:
                raise PipeClosed("the other end is closed")
            at += got
        return bytes(found)


def own_device(kind: str, rank: int) -> torch.device:
    """The device of this process, which is this rank: kernels and copies without a word go there."""
    device = device_of(kind, rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def device_of(kind: str, rank: int) -> torch.device:
    """The device of a rank: each has one."""
    return torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
