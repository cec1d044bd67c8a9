"""Which transports an engine opens, and over which memory."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pdctl.engine.cache.memory import DeviceMemory, Memory
from pdctl.engine.core import transports
from pdctl.engine.core.transports import open_transports
from pdctl.engine.options import EngineOptions, parse
from pdctl.engine.transfer import Settings, TransferError, transport_kind
from tests.fakes import cudart


class Pool:
    """On a "GPU" that is host memory. Counts its mirrors."""

    def __init__(self, is_on_host: bool = False) -> None:
        self.is_on_host = is_on_host
        self.memory = Memory(4096, "ab")
        self.mirrors = 0

    @property
    def device_memory(self) -> DeviceMemory:
        return DeviceMemory(self.memory.base, 4096, 0)

    def mirror(self, epoch: str) -> Memory:
        self.mirrors += 1
        return self.memory


def options(device: str, transfer: str = "auto", host: str = "127.0.0.1") -> EngineOptions:
    words = ["--name", "e", "--model", "m", "--port", "1", "--run-dir", "/x", "--epoch", "ab", "--device", device]
    return parse([*words, "--transfer", transfer, "--host", host])


@pytest.mark.skipif(bool(cudart.NO_COMPILER), reason=cudart.NO_COMPILER)
def test_engines_on_gpus_map_each_others_memory_and_have_no_copy_of_it() -> None:
    cudart.load()
    pool = Pool()
    [(name, (transport, is_direct))] = open_transports(options("cuda"), pool).items()
    assert is_direct
    assert name == transport.name == "cuda_ipc"
    assert transport.address
    assert pool.mirrors == 0
    transport.close()


def test_where_that_cannot_work_kv_goes_through_host_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = transport_kind

    def kind(name: str) -> object:
        if name == "cuda_ipc":
            raise TransferError("no handles in this container")
        return real(name)

    monkeypatch.setattr(transports, "transport_kind", kind)
    pool = Pool()
    with caplog.at_level(logging.WARNING):
        [(name, (transport, is_direct))] = open_transports(options("cuda"), pool).items()
    assert not is_direct, "what it reads is copied from a staging area"
    assert (name, pool.mirrors) == ("shm", 1)
    assert transport.fallback == "cuda_ipc: no handles in this container", "as status shows it"
    assert "no handles in this container; using shm" in caplog.text
    with pytest.raises(TransferError, match="no handles"):
        open_transports(options("cuda", "cuda_ipc"), pool)
    transport.close()
    caplog.clear()  # its records hold the failure, and so the pool


@pytest.mark.parametrize("transfer", ["auto", "shm"])
def test_engines_on_cpus_share_memory(transfer: str, tmp_path: Path) -> None:
    pool = Pool(is_on_host=True)
    [(name, (transport, is_direct))] = open_transports(options("cpu", transfer), pool).items()
    assert is_direct
    assert (name, pool.mirrors) == ("shm", 1)
    transport.close()


class Opened:
    """A transport of which only the name matters."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.protocol, self.fallback, self.address = "tcp", "", name


@pytest.mark.parametrize(
    ("missing", "wanted"),
    [((), ["shm", "mooncake"]), (("mooncake",), ["shm", "nixl"]), (("mooncake", "nixl"), ["shm"])],
)
def test_an_engine_that_other_hosts_reach_opens_one_transport_for_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, missing: tuple[str, ...], wanted: list[str]
) -> None:
    class Kind:
        def __init__(self, name: str) -> None:
            self.name = name

        def open_transport(self, memory: object, settings: Settings) -> Opened:
            if self.name in missing:
                raise TransferError("not installed")
            assert settings.host == "10.0.0.7"
            return Opened(self.name)

    monkeypatch.setattr(transports, "transport_kind", Kind)
    with caplog.at_level(logging.WARNING):
        assert list(open_transports(options("cpu", host="10.0.0.7"), Pool(is_on_host=True))) == wanted
    alone = "cannot read the KV of this engine: mooncake: not installed; nixl: not installed"
    assert (alone in caplog.text) == (wanted == ["shm"])
