"""Mooncake's TransferEngine over TCP or RDMA, for peers on any host.

Serving and reading use separate engines, so that the reading one can be replaced while peers continue to read.
The library's blocking calls spin on a core, so reads are started as single-span batches and polled with sleeps. A batch
is over when its status says so (measured: nothing arrives after a failed status).
A GPU's memory is registered like the host's, where RDMA reaches it and the library is built for CUDA. Over TCP older
versions crash on addresses of a GPU (kvcache-ai/Mooncake, issue 917).
It listens on every interface without authentication: see docs/transports.md.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pdctl.engine.cache.layout import Span
from pdctl.engine.cache.memory import DeviceMemory, Memory
from pdctl.engine.transfer import (
    DeviceMemoryRefused,
    Settings,
    TransferError,
    TransferUncertain,
    carrier,
    check_spans,
)

if TYPE_CHECKING:
    from mooncake.engine import TransferEngine

_POLL_S = 0.0003
_DONE = 1
# Status "running", and "given up" while bytes may still arrive: neither is over (transfer_engine_py.cpp frees a batch's
# id for every other status).
_NOT_OVER = (0, -2)
# Maximum size of a batch: large enough that its fixed cost is negligible, small enough that TCP's lanes share a large
# span evenly (docs/performance.md, Transports). RDMA splits by itself.
_PIECE_BYTES = {"tcp": 256 * 2**10, "rdma": 4 * 2**20}
# Limit of pieces per read, because the library's queues are limited. A larger read gets larger pieces.
_MOST_PIECES = 8192
# The last bytes of a peer's announced memory are its epoch: a reader checks them before it trusts an address.
_EPOCH_BYTES = 64
_CONNECT_S = 5.0
_PROBES = 1024
# Read when the library is loaded. Queues: the default limits fail transfers of more than 2048 spans. Progress: a peer
# that moves nothing for this long has failed (default 30).
_ENVIRONMENT = {
    "MC_LOG_LEVEL": "ERROR",
    "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "65535",
    "MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER": "65535",
    "MC_TCP_ADMISSION_TIMEOUT_MS": "30000",
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "5",
}


def open_transport(memory: Memory | DeviceMemory, settings: Settings) -> MooncakeTransport:
    """See Kind.open_transport."""
    return MooncakeTransport(memory, settings)


class MooncakeTransport:
    """`address` is HOST:PORT/BASE/LABEL/EPOCH: session, then pool and epoch label as addresses in the peer."""

    name = "mooncake"

    def __init__(self, memory: Memory | DeviceMemory, settings: Settings) -> None:
        self._memory = memory
        self._settings = settings
        self.protocol, self.fallback = carrier(settings, "tcp")
        if isinstance(memory, DeviceMemory) and self.protocol != "rdma":
            raise DeviceMemoryRefused("only RDMA reaches the memory of a GPU")
        _set_environment(settings, self.protocol)
        self._probes = np.zeros((_PROBES, _EPOCH_BYTES), dtype=np.uint8)
        self._probed = 0
        self._label = np.zeros(_EPOCH_BYTES, dtype=np.uint8)
        self._lock = threading.Lock()
        self._reader: TransferEngine | None = None
        self._sessions: dict[str, str] = {}
        self.address = ""
        self._server = self._serve() if settings.serving else None

    def connect(self, address: str, peer_bytes: int) -> None:
        """See Transport.connect. Reads the peer's epoch, because an address may outlive its process."""
        session, _, label, epoch = _parts(address)
        with self._lock:
            if self._sessions.get(session) == epoch:
                return
            if session in self._sessions:
                # A restarted peer on an old port: the library caches the first session forever.
                self._reader, self._sessions = None, {}
            reader, known = self._reading(), self._sessions
            # A late probe may still be written: its slot is reused only after all others.
            probe = self._probes[self._probed % _PROBES]
            probe[:] = 0
            self._probed += 1
        self._move(reader, session, [(probe.ctypes.data, label, _EPOCH_BYTES)], _CONNECT_S)
        found = probe.tobytes().rstrip(b"\0").decode(errors="replace")
        if found != epoch:
            raise TransferError(f"the peer at {session} runs epoch {found!r}, not {epoch!r}")
        with self._lock:
            known[session] = epoch

    def read(self, address: str, peer_bytes: int, spans: Sequence[Span], timeout_s: float) -> int:
        """See Transport.read."""
        total = check_spans(spans, peer_bytes, self._memory.num_bytes)
        self.connect(address, peer_bytes)
        session, base, *_ = _parts(address)
        with self._lock:
            reader = self._reading()
        ours, most = self._memory.base, max(_PIECE_BYTES[self.protocol], total // _MOST_PIECES)
        pieces = [
            (ours + target + done, base + source + done, min(most, length - done))
            for source, target, length in spans
            for done in range(0, length, most)
        ]
        self._move(reader, session, pieces, timeout_s)
        return total

    def forget(self, address: str) -> None:
        """See Transport.forget. Only the name of a session is kept."""

    def prune(self) -> None:
        """See Transport.prune. Sessions hold no memory of their peers."""

    def close(self) -> None:
        """See Transport.close."""
        with self._lock:
            for engine in (self._reader, self._server):
                if engine is not None:
                    engine.unregister_memory(self._memory.base)
            self._reader = self._server = None
            self._sessions = {}

    def _serve(self) -> TransferEngine:
        epoch = self._settings.epoch.encode()
        assert len(epoch) < _EPOCH_BYTES
        self._label[: len(epoch)] = np.frombuffer(epoch, dtype=np.uint8)
        server = self._open()
        self._register_pool(server)
        _register(server, self._label.ctypes.data, _EPOCH_BYTES)
        session = f"{self._settings.host}:{server.get_rpc_port()}"
        self.address = f"{session}/{self._memory.base}/{self._label.ctypes.data}/{self._settings.epoch}"
        return server

    def _reading(self) -> TransferEngine:
        """The reading engine. Called with the lock held."""
        if self._reader is None:
            self._reader = self._open()
            self._register_pool(self._reader)
            _register(self._reader, self._probes.ctypes.data, self._probes.nbytes)
        return self._reader

    def _register_pool(self, engine: TransferEngine) -> None:
        try:
            _register(engine, self._memory.base, self._memory.num_bytes)
        except TransferError as failure:
            if isinstance(self._memory, DeviceMemory):
                raise DeviceMemoryRefused(f"{failure} (is the kernel module nvidia_peermem loaded?)") from failure
            raise

    def _open(self) -> TransferEngine:
        try:
            library = importlib.import_module("mooncake.engine")
        except ImportError as failure:
            raise TransferError(_import_hint(str(failure))) from failure
        if isinstance(self._memory, DeviceMemory) and not getattr(library, "SUPPORT_CUDA", False):
            raise DeviceMemoryRefused("this build does not know GPUs; install mooncake-transfer-engine instead of it")
        engine: TransferEngine = library.TransferEngine()
        devices = ",".join(self._settings.devices) if self.protocol == "rdma" else ""
        if engine.initialize(self._settings.host, "P2PHANDSHAKE", self.protocol, devices) != 0:
            where = f"ports {self._settings.ports}" if self._settings.ports else "its ports"
            raise TransferError(f"mooncake cannot listen on {where}; give transfer.ports at least 100 free ports")
        return engine

    def _move(self, reader: TransferEngine, session: str, pieces: list[tuple[int, int, int]], timeout_s: float) -> None:
        """Start every piece, then poll with sleeps until all are over or the timeout has passed."""
        deadline = time.monotonic() + timeout_s
        started = [reader.batch_transfer_async_read(session, [ours], [theirs], [size]) for ours, theirs, size in pieces]
        batches = _Batches(reader, [batch for batch in started if batch])
        batches.failed = len(batches.pending) < len(started)
        while not batches.over():
            if time.monotonic() > deadline:
                raise TransferUncertain(f"{session} did not deliver within {timeout_s:g} s", batches.over)
            time.sleep(_POLL_S)
        if batches.failed:
            raise TransferError(f"the transfer from {session} failed")


class _Batches:
    """Running transfers. Keeps the engine alive until all are over."""

    def __init__(self, reader: TransferEngine, pending: list[int]) -> None:
        self._reader = reader
        self.pending = pending
        self.failed = False

    def over(self) -> bool:
        """Whether all are over. The status call that reports an end frees the id, so each is polled once after its end
        and never again. They are polled in order, because later ones rarely end before earlier ones."""
        while self.pending:
            status = self._reader.transfer_check_status(self.pending[0])
            if status in _NOT_OVER:
                return False
            self.failed = self.failed or status != _DONE
            self.pending.pop(0)
        return True


def _set_environment(settings: Settings, protocol: str) -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if protocol == "tcp":
        os.environ["MC_FORCE_TCP"] = "1"
    if settings.ports:
        os.environ["MC_MIN_RPC_PORT"], os.environ["MC_MAX_RPC_PORT"] = map(str, settings.ports)


def _register(engine: TransferEngine, base: int, num_bytes: int) -> None:
    code = engine.register_memory(base, num_bytes)
    if code != 0:
        raise TransferError(f"mooncake cannot register {num_bytes} bytes (code {code}); is memlock limited?")


def _parts(address: str) -> tuple[str, int, int, str]:
    try:
        session, base, label, epoch = address.split("/")
        host, _, port = session.rpartition(":")
        if not host or not 0 < int(port) < 65536 or int(base) <= 0 or int(label) <= 0:
            raise ValueError("a part is out of range")
        return session, int(base), int(label), epoch
    except ValueError as failure:
        raise TransferError(f"{address!r} is not a mooncake address: {failure}") from failure


def _import_hint(failure: str) -> str:
    if "libibverbs" in failure:
        return f"mooncake cannot be loaded ({failure}); install it with: apt-get install libibverbs1"
    return f"mooncake cannot be loaded ({failure}); install it with: pip install mooncake-transfer-engine-non-cuda"
