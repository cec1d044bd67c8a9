"""NIXL over UCX: shared memory, TCP or RDMA, for peers on any host.

A handle that is released early reports DONE while its bytes still arrive (measured over TCP with a frozen peer), so a
late read's handle is kept and polled until it is over."""

from __future__ import annotations

import base64
import binascii
import importlib
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol, cast

from pdctl.engine.cache.layout import Span
from pdctl.engine.cache.memory import Memory
from pdctl.engine.transfer import Settings, TransferError, TransferUncertain, carrier, check_spans
from pdctl.host.address import interface_of
from pdctl.net import is_loopback

_POLL_S = 0.0003
_PACKAGES = ("nixl_cu12", "nixl_cu13")


class _Agent(Protocol):
    """The part of nixl's untyped agent that is used here."""

    def register_memory(self, descs: list[tuple[int, int, int, str]], mem_type: str) -> object: ...
    def deregister_memory(self, descs: object) -> None: ...
    def get_agent_metadata(self) -> bytes: ...
    def add_remote_agent(self, metadata: bytes) -> bytes: ...
    def remove_remote_agent(self, agent: str) -> None: ...
    def get_xfer_descs(self, descs: list[tuple[int, int, int]], mem_type: str) -> object: ...
    def initialize_xfer(self, operation: str, local: object, remote: object, agent: str) -> object: ...
    def transfer(self, handle: object) -> str: ...
    def check_xfer_state(self, handle: object) -> str: ...
    def release_xfer_handle(self, handle: object) -> None: ...


def open_transport(memory: Memory, settings: Settings) -> NixlTransport:
    """See Kind.open_transport."""
    return NixlTransport(memory, settings)


class NixlTransport:
    """`address` is BASE/EPOCH/METADATA. The agent's name contains the epoch, and a peer's epoch is checked."""

    name = "nixl"

    def __init__(self, memory: Memory, settings: Settings) -> None:
        self._memory = memory
        self.protocol, self.fallback = carrier(settings, "tcp" if settings.protocol == "rdma" else "sm+tcp")
        _set_environment(settings, self.protocol)
        # nixl's agent is not thread-safe; its calls only start and poll transfers, so they are short.
        self._lock = threading.Lock()
        self._agent, self._errors = _new_agent(f"{settings.epoch}/{os.getpid()}/{id(self)}")
        try:
            self._registered = self._agent.register_memory([(memory.base, memory.num_bytes, 0, "")], "DRAM")
        except self._errors as failure:
            raise TransferError(f"nixl cannot register {memory.num_bytes} bytes: {failure}") from failure
        self._peers: dict[str, str] = {}
        self.address = ""
        if settings.serving:
            metadata = base64.urlsafe_b64encode(self._agent.get_agent_metadata()).decode()
            self.address = f"{memory.base}/{settings.epoch}/{metadata}"

    def connect(self, address: str, peer_bytes: int) -> None:
        """See Transport.connect."""
        with self._lock:
            self._peer(address)

    def read(self, address: str, peer_bytes: int, spans: Sequence[Span], timeout_s: float) -> int:
        """See Transport.read."""
        total = check_spans(spans, peer_bytes, self._memory.num_bytes)
        base, ours = _parts(address)[0], self._memory.base
        wanted = [span for span in spans if span.length]
        if not wanted:
            return 0
        deadline = time.monotonic() + timeout_s
        read = _Read(self, address)
        read.start([(ours + t, n, 0) for _, t, n in wanted], [(base + s, n, 0) for s, _, n in wanted])
        while not read.over():
            if time.monotonic() > deadline:
                raise TransferUncertain(f"the peer did not deliver within {timeout_s:g} s", read.over)
            time.sleep(_POLL_S)
        if read.failure:
            raise TransferError(f"the transfer failed: {read.failure}")
        return total

    def forget(self, address: str) -> None:
        """See Transport.forget."""
        with self._lock:
            self._forget(address)

    def prune(self) -> None:
        """See Transport.prune. Peers are forgotten if a transfer fails or a newer epoch replaces them."""

    def close(self) -> None:
        """See Transport.close."""
        with self._lock:
            for peer in self._peers.values():
                with suppress(*self._errors):
                    self._agent.remove_remote_agent(peer)
            self._peers = {}
            with suppress(*self._errors):
                self._agent.deregister_memory(self._registered)
            self.address = ""

    def _peer(self, address: str) -> str:
        """The agent's name behind an address. Called with the lock held."""
        if address not in self._peers:
            _, epoch, metadata = _parts(address)
            try:
                name = self._agent.add_remote_agent(metadata)
            except self._errors as failure:
                raise TransferError(f"the peer cannot be added: {failure}") from failure
            peer = name.decode() if isinstance(name, bytes) else str(name)
            if peer.partition("/")[0] != epoch:
                raise TransferError(f"the peer's agent is {peer!r}, not one of epoch {epoch!r}")
            self._peers[address] = peer
        return self._peers[address]

    def _forget(self, address: str) -> None:
        """Forget a peer. Called with the lock held."""
        if peer := self._peers.pop(address, None):
            with suppress(*self._errors):
                self._agent.remove_remote_agent(peer)


class _Read:
    """One transfer. Its handle is released only when it is over."""

    def __init__(self, transport: NixlTransport, address: str) -> None:
        self.failure = ""
        self._transport = transport
        self._address = address
        self._handle: object = None
        self._over = False

    def start(self, ours: list[tuple[int, int, int]], theirs: list[tuple[int, int, int]]) -> None:
        transport, agent = self._transport, self._transport._agent
        with transport._lock:
            peer = transport._peer(self._address)
            try:
                local, remote = agent.get_xfer_descs(ours, "DRAM"), agent.get_xfer_descs(theirs, "DRAM")
                self._handle = agent.initialize_xfer("READ", local, remote, peer)
                agent.transfer(self._handle)
            except transport._errors as failure:
                self._end(str(failure))

    def over(self) -> bool:
        """Whether the transfer is over."""
        transport = self._transport
        with transport._lock:
            if self._over:
                return True
            try:
                state = transport._agent.check_xfer_state(self._handle)
            except transport._errors as failure:
                self._end(str(failure) or type(failure).__name__)
            else:
                if state == "DONE":
                    self._end("")
                elif state != "PROC":
                    self._end(state)
            return self._over

    def _end(self, failure: str) -> None:
        self.failure = failure
        self._over = True
        if self._handle is not None:
            with suppress(*self._transport._errors):
                self._transport._agent.release_xfer_handle(self._handle)
        if failure:
            self._transport._forget(self._address)


def _new_agent(name: str) -> tuple[_Agent, tuple[type[Exception], ...]]:
    """nixl's agent, and the exceptions that its calls raise: each is a separate class in its bindings."""
    for package in _PACKAGES:
        try:
            api = importlib.import_module(f"{package}._api")
            bindings = importlib.import_module(f"{package}._bindings")
        except ImportError:
            continue
        found = [entry for entry in vars(bindings).values() if isinstance(entry, type)]
        errors = tuple(entry for entry in found if issubclass(entry, Exception))
        try:
            return cast(_Agent, api.nixl_agent(name, api.nixl_agent_config(backends=["UCX"]))), errors
        except errors as failure:
            raise TransferError(f"nixl's UCX backend cannot start: {failure}") from failure
    raise TransferError("nixl is not installed; install it with: pip install 'pdctl[nixl]'")


def _set_environment(settings: Settings, protocol: str) -> None:
    """Set variables that UCX reads when its first context is created. The user's values take precedence."""
    layers = {"tcp": "tcp,self", "sm+tcp": "sm,tcp,self", "rdma": "rc,sm,tcp,self"}[protocol]
    os.environ.setdefault("UCX_TLS", layers)
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    if protocol == "rdma" and settings.devices:
        os.environ.setdefault("UCX_NET_DEVICES", ",".join(f"{name}:1" for name in settings.devices))
    elif protocol != "rdma" and not is_loopback(settings.host) and (interface := interface_of(settings.host)):
        # UCX would listen on all interfaces, and offer peers on other hosts the address of loopback.
        os.environ.setdefault("UCX_NET_DEVICES", interface)


def _parts(address: str) -> tuple[int, str, bytes]:
    try:
        base, epoch, metadata = address.split("/")
        if int(base) <= 0:
            raise ValueError("no such base")
        return int(base), epoch, base64.urlsafe_b64decode(metadata)
    except (ValueError, binascii.Error) as failure:
        raise TransferError(f"{address[:60]!r} is not a nixl address: {failure}") from failure
