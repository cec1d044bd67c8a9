"""Mooncake over the memory of a GPU, with a stand-in for the library: what is registered, and when host memory is used.

What the library then does with such an address has not been run: docs/limits.md."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import ModuleType

import pytest

from pdctl.engine import transfer
from pdctl.engine.cache.layout import Span
from pdctl.engine.cache.memory import DeviceMemory
from pdctl.engine.core.transports import open_transports
from tests.engine.core.test_transports import Pool, options

# An address of a GPU: nothing on the host may touch it.
BASE = 0x7F00_0000_0000


class Library:
    """mooncake.engine. `refused`: addresses that cannot be registered."""

    def __init__(self, patch: pytest.MonkeyPatch, cuda: bool | None = True) -> None:
        self.registered: list[tuple[int, int]] = []
        self.unregistered: list[int] = []
        self.reads: list[tuple[str, list[int], list[int], list[int]]] = []
        self.refused: set[int] = set()
        self.protocols: list[str] = []
        module = ModuleType("mooncake.engine")
        module.TransferEngine = lambda: _Engine(self)  # type: ignore[attr-defined]
        if cuda is not None:
            module.SUPPORT_CUDA = cuda  # type: ignore[attr-defined]
        patch.setitem(sys.modules, "mooncake.engine", module)


class _Engine:
    def __init__(self, library: Library) -> None:
        self._library = library

    def initialize(self, host: str, metadata: str, protocol: str, devices: str) -> int:
        self._library.protocols.append(protocol)
        return 0

    def register_memory(self, base: int, num_bytes: int) -> int:
        if base in self._library.refused:
            return -1
        self._library.registered.append((base, num_bytes))
        return 0

    def unregister_memory(self, base: int) -> int:
        self._library.unregistered.append(base)
        return 0

    def get_rpc_port(self) -> int:
        return 15_001

    def batch_transfer_async_read(self, session: str, ours: list[int], theirs: list[int], sizes: list[int]) -> int:
        self._library.reads.append((session, ours, theirs, sizes))
        return len(self._library.reads)

    def transfer_check_status(self, batch: int) -> int:
        return 1


@pytest.fixture
def rdma(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an RDMA device."""
    monkeypatch.setattr(transfer, "active_devices", lambda: ["mlx5_0"])


class OnGpu(Pool):
    @property
    def device_memory(self) -> DeviceMemory:
        return DeviceMemory(BASE, 4096, 0)


@pytest.mark.usefixtures("rdma")
def test_the_memory_of_a_gpu_is_registered_and_has_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    library, pool = Library(monkeypatch), OnGpu()
    [(name, (transport, is_direct))] = open_transports(options("cuda", "mooncake"), pool).items()
    assert is_direct
    assert (name, transport.protocol, transport.fallback, pool.mirrors) == ("mooncake", "rdma", "", 0)
    assert library.registered[0] == (BASE, 4096)
    assert f"/{BASE}/" in transport.address
    # A reading engine of its own writes there.
    monkeypatch.setattr(type(transport), "connect", lambda self, address, peer_bytes: None)
    peer = "10.0.0.9:15002/4096/9000/e2"
    assert transport.read(peer, 4096, [Span(64, 128, 256)], 1.0) == 256
    assert library.reads == [("10.0.0.9:15002", [BASE + 128], [4096 + 64], [256])]
    assert library.registered.count((BASE, 4096)) == 2
    transport.close()
    assert library.unregistered == [BASE, BASE]


@pytest.mark.usefixtures("rdma")
@pytest.mark.parametrize(
    ("cuda", "refused", "reason"),
    [
        (True, {BASE}, "mooncake cannot register 4096 bytes"),
        (False, set(), "this build does not know GPUs"),
        (None, set(), "this build does not know GPUs"),
    ],
)
def test_where_it_cannot_be_registered_a_copy_is_and_status_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cuda: bool | None, refused: set[int], reason: str
) -> None:
    library, pool = Library(monkeypatch, cuda), OnGpu()
    library.refused = refused
    [(transport, is_direct)] = open_transports(options("cuda", "mooncake"), pool).values()
    assert not is_direct
    assert pool.mirrors == 1
    assert library.registered[0] == (pool.memory.base, 4096)
    assert transport.fallback.startswith(f"mooncake goes through host memory: {reason}")
    assert reason in caplog.text
    transport.close()
    caplog.clear()


def test_over_tcp_there_is_a_copy_and_no_fallback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """TCP is what this machine has. An address of a GPU could crash the library."""
    monkeypatch.setattr(transfer, "active_devices", list)
    library, pool = Library(monkeypatch), OnGpu()
    with caplog.at_level(logging.WARNING):
        [(transport, is_direct)] = open_transports(options("cuda", "mooncake"), pool).values()
        assert not is_direct
    assert (transport.protocol, transport.fallback, pool.mirrors) == ("tcp", "", 1)
    assert BASE not in [base for base, _ in library.registered]
    assert "only RDMA reaches the memory of a GPU" in caplog.text
    transport.close()
    caplog.clear()


@pytest.mark.usefixtures("rdma")
def test_engines_on_cpus_register_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(monkeypatch, cuda=False)
    pool = Pool(is_on_host=True)
    [(transport, is_direct)] = open_transports(options("cpu", "mooncake"), pool).values()
    assert is_direct
    assert (transport.fallback, pool.mirrors) == ("", 1)
    assert library.registered[0] == (pool.memory.base, 4096)
    transport.close()


def test_the_installed_library_says_that_it_has_no_gpus() -> None:
    """The real one, which is built for machines without a GPU. In a process of its own: it keeps a socket."""
    code = """
import sys
from pdctl.engine import transfer
from pdctl.engine.cache.memory import DeviceMemory
transfer.active_devices = lambda: ["mlx5_0"]
try:
    transfer.transport_kind("mooncake").open_transport(DeviceMemory(1 << 40, 4096, 0), transfer.Settings("ff"))
except transfer.TransferError as failure:
    sys.exit(f"{type(failure).__name__}: {failure}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    if "cannot be loaded" in done.stderr:
        pytest.skip(f"NOT TESTED: {done.stderr}")
    assert "DeviceMemoryRefused: this build does not know GPUs" in done.stderr
