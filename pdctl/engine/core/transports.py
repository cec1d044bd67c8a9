"""Opens the transports of an engine over its KV pool."""

from __future__ import annotations

import logging
from typing import NamedTuple, Protocol

from pdctl.engine.cache.memory import DeviceMemory, Memory
from pdctl.engine.handover.reading import Staging
from pdctl.engine.options import EngineOptions
from pdctl.engine.transfer import DeviceMemoryRefused, Settings, TransferError, Transport, transport_kind
from pdctl.net import is_loopback, reachable
from pdctl.transports import FAR, TRANSPORTS

_STAGING_BYTES = 16 << 20

_log = logging.getLogger(__name__)


class Pool(Protocol):
    """What transports need of a KV pool. `is_on_host`: it is in host memory, and its own mirror."""

    is_on_host: bool

    @property
    def device_memory(self) -> DeviceMemory:
        """Its place in a GPU's memory."""
        ...

    def mirror(self, epoch: str) -> Memory:
        """Its bytes in host memory."""
        ...


class Opened(NamedTuple):
    """A transport over a pool. `is_direct`: it reads into the pool; others only serve a copy in host memory."""

    transport: Transport
    is_direct: bool


def open_transports(options: EngineOptions, pool: Pool) -> dict[str, Opened]:
    """Open the configured transport. `auto`: for peers on this host `cuda_ipc` on GPUs, and else `shm`; if peers on
    other hosts reach this engine, also the first that works of those that cross hosts. Raises TransferError, NoMemory.
    """
    settings = _settings(options)
    if options.transfer == "auto":
        opened = [_nearest(options, pool, settings)]
        if not is_loopback(settings.host):
            opened += _across_hosts(options, pool, settings)
        return {one.transport.name: one for one in opened}
    return {options.transfer: _open(options.transfer, options, pool, settings)}


def open_staging(options: EngineOptions, name: str) -> Staging:
    """A staging area, for a peer whose devices share the KV heads in another way. Raises TransferError, NoMemory."""
    memory = Memory(_STAGING_BYTES, options.epoch)
    return Staging(memory, transport_kind(name).open_transport(memory, _settings(options, serving=False)))


def _settings(options: EngineOptions, serving: bool = True) -> Settings:
    return Settings(
        epoch=options.epoch,
        host=reachable(options.host),
        protocol=options.transfer_protocol,
        devices=tuple(filter(None, options.transfer_devices.split(","))),
        ports=options.port_range,
        serving=serving,
    )


def _nearest(options: EngineOptions, pool: Pool, settings: Settings) -> Opened:
    if pool.is_on_host:
        return _open("shm", options, pool, settings)
    try:
        return _open("cuda_ipc", options, pool, settings)
    except TransferError as failure:
        reason = f"cuda_ipc: {failure}"
    _log.warning("%s; using shm, through host memory", reason)
    opened = _open("shm", options, pool, settings)
    opened.transport.fallback = reason
    return opened


def _across_hosts(options: EngineOptions, pool: Pool, settings: Settings) -> list[Opened]:
    """One, or none with a warning: peers on this host are served without it."""
    reasons = []
    for name in FAR:
        try:
            return [_open(name, options, pool, settings)]
        except TransferError as failure:
            reasons.append(f"{name}: {failure}")
    _log.warning("peers on other hosts cannot read the KV of this engine: %s", "; ".join(reasons))
    return []


def _on_gpu_or_host(name: str, pool: Pool, settings: Settings) -> Opened:
    kind = transport_kind(name)
    try:
        transport = kind.open_transport(pool.device_memory, settings)
        _log.info("%s reads and writes the GPU's memory", name)
        return Opened(transport, is_direct=True)
    except DeviceMemoryRefused as refused:
        reason = f"{name} goes through host memory: {refused}"
    transport = kind.open_transport(pool.mirror(settings.epoch), settings)
    if transport.protocol == "rdma":
        # RDMA could have done without the copies. Over TCP there is nothing better.
        transport.fallback = reason
    _log.warning("%s", reason)
    return Opened(transport, is_direct=False)


def _open(name: str, options: EngineOptions, pool: Pool, settings: Settings) -> Opened:
    info = TRANSPORTS[name]
    if info.may_be_on_gpu and not pool.is_on_host:
        opened = _on_gpu_or_host(name, pool, settings)
    else:
        memory = pool.device_memory if info.on_gpu else pool.mirror(settings.epoch)
        transport = transport_kind(name).open_transport(memory, settings)
        opened = Opened(transport, is_direct=info.on_gpu or pool.is_on_host)
    transport = opened.transport
    if transport.fallback:
        _log.warning("%s: %s; using %s", name, transport.fallback, transport.protocol)
    if info.is_open_to_strangers:
        _log.warning("%s listens on every interface without authentication: protect its ports with a firewall", name)
    return opened
