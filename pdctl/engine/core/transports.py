"""Opens the transports of an engine over its KV pool."""

from __future__ import annotations

import logging
from typing import Protocol

from pdctl.engine.cache.memory import DeviceMemory, Memory
from pdctl.engine.options import EngineOptions
from pdctl.engine.transfer import Settings, TransferError, Transport, transport_kind
from pdctl.net import reachable
from pdctl.transports import TRANSPORTS

_log = logging.getLogger(__name__)


class Pool(Protocol):
    """What transports need of a KV pool."""

    @property
    def device_memory(self) -> DeviceMemory:
        """Its place in a GPU's memory."""
        ...

    def mirror(self, epoch: str) -> Memory:
        """Its bytes in host memory."""
        ...


def open_transports(options: EngineOptions, pool: Pool) -> dict[str, Transport]:
    """Open the configured transport. `auto`: all engines of a topology are on this host and on one kind of device, so
    it means `cuda_ipc` on GPUs, and else `shm`. Raises TransferError, NoMemory."""
    settings = Settings(
        epoch=options.epoch,
        host=reachable(options.host),
        protocol=options.transfer_protocol,
        devices=tuple(filter(None, options.transfer_devices.split(","))),
        ports=options.port_range,
    )
    if options.transfer == "auto":
        return {transport.name: transport for transport in [_nearest(options, pool, settings)]}
    return {options.transfer: _open(options.transfer, pool, settings)}


def _nearest(options: EngineOptions, pool: Pool, settings: Settings) -> Transport:
    if options.device == "cpu":
        return _open("shm", pool, settings)
    try:
        return _open("cuda_ipc", pool, settings)
    except TransferError as failure:
        reason = f"cuda_ipc: {failure}"
    _log.warning("%s; using shm, through host memory", reason)
    transport = _open("shm", pool, settings)
    transport.fallback = reason
    return transport


def _open(name: str, pool: Pool, settings: Settings) -> Transport:
    info = TRANSPORTS[name]
    memory = pool.device_memory if info.on_gpu else pool.mirror(settings.epoch)
    transport = transport_kind(name).open_transport(memory, settings)
    if transport.fallback:
        _log.warning("%s: %s; using %s", name, transport.fallback, transport.protocol)
    if info.is_open_to_strangers:
        _log.warning("%s listens on every interface without authentication: protect its ports with a firewall", name)
    return transport
