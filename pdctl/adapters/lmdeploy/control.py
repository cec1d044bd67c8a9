"""The supervisor's calls to LMDeploy engines: links between pairs, progress, and a sweep of what requests have left.

LMDeploy's engines keep no list of their links and do not notice that a peer was restarted: the supervisor must remember
which starts of two engines are linked, and link again. Initializing a link twice leaks its sockets, so a link that may
exist is dropped first. A drop of a link that does not exist ends in status 500, which changes nothing there.

The sessions of an engine are numbered from 0. Freeing one that does not exist only writes a line to its log. So an
engine in which nothing runs and no KV waits to be read is swept by freeing every number that it may have used.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar, cast

import msgspec

from pdctl.adapters.control import Ability, NoControl, Peer, Progress, Target
from pdctl.adapters.lmdeploy.messages import (
    SUCCESS,
    TRANSFER,
    CacheFree,
    EngineConfig,
    LinkType,
    engine_id,
    is_numeric,
    parse_config,
)
from pdctl.host.devices.rdma import read_tree
from pdctl.net.http_client import ConnectionPool, Unreachable
from pdctl.net.internal_calls import CallRefused
from pdctl.wire import LinkInfo

Reply = TypeVar("Reply", bound=msgspec.Struct)
One = TypeVar("One")
Other = TypeVar("Other")

_INFO_S = 5.0
_DROP_S = 5.0
# Sweeps: concurrent calls, and how many numbers above the known requests are freed, for requests of other clients.
_SWEEPERS = 8
_SLACK = 128
# prometheus_client's name for the start of the process, and LMDeploy's for the load.
_METRIC = re.compile(rb"^([a-z_:]+)(?:\{[^\n]*\})? ([0-9]+(?:\.[0-9]+)?(?:e\+?[0-9]{1,2})?)$", re.MULTILINE)
_RUNNING, _STARTED = b"lmdeploy:num_requests_running", b"process_start_time_seconds"
_TOKENS = (b"lmdeploy:prompt_tokens_total", b"lmdeploy:generation_tokens_total")
_ENDED = (b"lmdeploy:num_requests_succeeded", b"lmdeploy:num_requests_failed")


class _Rdma(msgspec.Struct, frozen=True):
    link_type: int
    with_gdr: bool = True


class _Initialize(msgspec.Struct, frozen=True):
    local_engine_id: str
    local_engine_config: EngineConfig
    remote_engine_id: str
    remote_engine_config: EngineConfig
    protocol: int
    rdma_config: _Rdma
    rank: int | None = None
    tcp_config: None = None
    nvlink_config: None = None


class _Endpoint(msgspec.Struct, frozen=True):
    zmq_address: str


class _CachePool(msgspec.Struct, frozen=True):
    """The layout of one cache tensor. The axis `entry_axis` counts blocks and may differ between two engines."""

    shape: tuple[int, ...]
    dtype: str
    element_size: int
    entry_axis: int

    @property
    def block(self) -> tuple[object, ...]:
        """What must be equal on both sides."""
        shape = [size for axis, size in enumerate(self.shape) if axis != self.entry_axis]
        return (*shape, self.dtype, self.element_size)


class _Rank(msgspec.Struct, frozen=True):
    """What the supervisor reads of one tensor-parallel rank's end of a link."""

    cache_pools: tuple[_CachePool, ...] | None = None


class _Initialized(msgspec.Struct, frozen=True):
    """`kvtransfer_endpoint_info`: one for each rank. The peer gets them unchanged."""

    status: int
    engine_endpoint_info: _Endpoint
    kvtransfer_endpoint_info: tuple[msgspec.Raw, ...]

    def pools(self, rank: int) -> list[tuple[object, ...]] | None:
        """What a rank's peer must have too; None if the engine does not tell: up to 0.16. Raises CallRefused."""
        try:
            found = _decode_rank(self.kvtransfer_endpoint_info[rank]).cache_pools
        except msgspec.DecodeError as failure:
            raise CallRefused(f"the answer to p2p_initialize is not LMDeploy's: {failure}") from None
        return None if found is None else [pool.block for pool in found]


class _Connect(msgspec.Struct, frozen=True):
    protocol: int
    remote_engine_id: str
    remote_engine_endpoint_info: _Endpoint
    remote_kvtransfer_endpoint_info: tuple[msgspec.Raw, ...]


class _Connected(msgspec.Struct, frozen=True):
    status: int


class _Drop(msgspec.Struct, frozen=True):
    engine_id: str
    remote_engine_id: str


class _Dropped(msgspec.Struct, frozen=True):
    success: bool = False


class _Freed(msgspec.Struct, frozen=True):
    status: str = ""


class _Mismatch(Exception):
    """Two engines whose KV does not fit. Trying again does not help."""


_decode_rank = msgspec.json.Decoder(_Rank).decode


class LmdeployControl(NoControl):
    """See Control. `sysfs_root`: where the link layer of this machine's RDMA ports is read."""

    abilities = frozenset({Ability.LINK, Ability.SWEEP})
    progress_path = "/metrics"
    start_path = "/metrics"
    links_hybrids = False

    def __init__(self, sysfs_root: Path = Path("/sys")) -> None:
        self._sysfs_root = sysfs_root

    def progress(self, body: bytes) -> Progress:
        """See Control.progress. An engine updates the number of running requests every 10 s only."""
        found = _metrics(body)
        if _RUNNING not in found:
            raise ValueError("no LMDeploy metrics: start the engine without --disable-metrics")
        return Progress(running=int(found[_RUNNING]), tokens_total=int(sum(found.get(name, 0.0) for name in _TOKENS)))

    def start_of(self, body: bytes) -> str:
        """See Control.start_of."""
        started = _metrics(body).get(_STARTED)
        return "" if started is None else f"{started:.2f}"

    async def link(self, reader: Target, peers: list[Peer], timeout_s: float) -> list[LinkInfo]:
        """See Control.link."""
        config, layer = await _config(reader), await asyncio.to_thread(link_type, self._sysfs_root)
        return list(await asyncio.gather(*(_link(reader, config, layer, peer, timeout_s) for peer in peers)))

    async def unlink(self, reader: Target, peer: Peer, timeout_s: float) -> None:
        """See Control.unlink."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_drop(reader, peer.target, timeout_s))
            tasks.create_task(_drop(peer.target, reader, timeout_s))

    async def sweep(self, engine: Target, swept: int, sent: int, timeout_s: float) -> int:
        """See Control.sweep."""
        known = max(sent, await self._ended(engine))
        numbers = iter(range(max(0, swept - _SLACK), known + _SLACK))

        async def free() -> None:
            for number in numbers:
                call = CacheFree("pdctl", number)
                await engine.caller.post(engine.pool, "/distserve/free_cache", call, _Freed, _DROP_S)

        try:
            async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as tasks:
                for _ in range(_SWEEPERS):
                    tasks.create_task(free())
        except* TimeoutError:
            raise Unreachable(f"a sweep of {known} sessions took longer than {timeout_s:g} s") from None
        except* Unreachable as failures:
            raise failures.exceptions[0] from None
        return known

    async def _ended(self, engine: Target) -> int:
        """How many requests the engine says it has ended; 0 without metrics."""
        found = _metrics((await engine.caller.fetch(engine.pool, "/metrics", _INFO_S)).body)
        return int(sum(found.get(name, 0.0) for name in _ENDED))


CONTROL = LmdeployControl()


def _metrics(body: bytes) -> dict[bytes, float]:
    """The metrics of an engine; of the same name, the sum."""
    found: dict[bytes, float] = {}
    for name, value in _METRIC.findall(body):
        found[name] = found.get(name, 0.0) + float(value)
    return found


def _id(pool: ConnectionPool) -> str:
    return engine_id(pool.host, pool.port)


async def _config(engine: Target) -> EngineConfig:
    """Raises Unreachable, also for an engine that is not of DistServe."""
    answer = await engine.caller.fetch(engine.pool, "/distserve/engine_info", _INFO_S)
    found = parse_config(answer.body) if answer.status == 200 else None
    if found is None:
        raise CallRefused(f"status {answer.status}: {answer.body[:200].decode(errors='replace')}")
    return found


def link_type(sysfs_root: Path) -> LinkType:
    """The link layer of this machine's active RDMA ports. Its peers, on whatever machine, are in the same network."""
    ports = [port for device in read_tree(sysfs_root).devices for port in device.ports if port.state == "ACTIVE"]
    only_infiniband = ports and all(port.link_layer == "InfiniBand" for port in ports)
    return LinkType.INFINIBAND if only_infiniband else LinkType.ROCE


async def _link(reader: Target, config: EngineConfig, layer: LinkType, peer: Peer, timeout_s: float) -> LinkInfo:
    """Link one pair. A failure is in the answer, so that other pairs are not held up."""
    name, epoch = peer.address.name, peer.address.epoch
    try:
        async with asyncio.timeout(timeout_s):
            await _connect(reader, config, peer.target, layer)
    except _Mismatch as reason:
        return LinkInfo(name, epoch, error=str(reason), refused=True)
    except Unreachable as failure:
        return LinkInfo(name, epoch, error=str(failure))
    except TimeoutError:
        return LinkInfo(name, epoch, error=f"linking took longer than {timeout_s:g} s")
    return LinkInfo(name, epoch, transport="distserve", protocol=TRANSFER.name.lower(), reason=layer.name.lower())


async def _connect(reader: Target, config: EngineConfig, server: Target, layer: LinkType) -> None:
    """Initialize and connect both sides. Raises Unreachable, _Mismatch."""
    for engine in (reader, server):
        if not is_numeric(engine.pool.host):
            raise _Mismatch(f"LMDeploy needs addresses, not names: write the address of {engine.pool.host} in url")
    other = await _config(server)
    _compare(config, other)
    ours, theirs = await _both(
        _post(reader, "p2p_initialize", _initialize(reader, config, server, other, layer), _Initialized),
        _post(server, "p2p_initialize", _initialize(server, other, reader, config, layer), _Initialized),
    )
    _check("p2p_initialize", reader, ours.status)
    _check("p2p_initialize", server, theirs.status)
    _compare_pools(ours, theirs)
    connected, accepted = await _both(
        _post(reader, "p2p_connect", _connect_to(server, theirs), _Connected),
        _post(server, "p2p_connect", _connect_to(reader, ours), _Connected),
    )
    _check("p2p_connect", reader, connected.status)
    _check("p2p_connect", server, accepted.status)


def _compare(ours: EngineConfig, theirs: EngineConfig) -> None:
    for what in ("tp_size", "block_size"):
        mine, other = getattr(ours, what), getattr(theirs, what)
        if mine != other:
            raise _Mismatch(f"{what} is {mine} here and {other} there: LMDeploy needs the same on both sides")


def _compare_pools(ours: _Initialized, theirs: _Initialized) -> None:
    ranks = len(ours.kvtransfer_endpoint_info)
    if ranks != len(theirs.kvtransfer_endpoint_info):
        raise _Mismatch("the engines have different numbers of ranks")
    for rank in range(ranks):
        mine, other = ours.pools(rank), theirs.pools(rank)
        if mine is not None and other is not None and mine != other:
            raise _Mismatch("the layouts of the KV differ: the engines have different models or dtypes")


def _initialize(
    local: Target, config: EngineConfig, remote: Target, other: EngineConfig, layer: LinkType
) -> _Initialize:
    return _Initialize(_id(local.pool), config, _id(remote.pool), other, TRANSFER, _Rdma(layer))


def _connect_to(remote: Target, made: _Initialized) -> _Connect:
    return _Connect(TRANSFER, _id(remote.pool), made.engine_endpoint_info, made.kvtransfer_endpoint_info)


async def _both(one: Awaitable[One], other: Awaitable[Other]) -> tuple[One, Other]:
    """The results of two calls that run at once. Both have ended before a failure is raised."""
    first, second = await asyncio.gather(one, other, return_exceptions=True)
    for found in (first, second):
        if isinstance(found, BaseException):
            raise found
    return cast(One, first), cast(Other, second)


async def _post(engine: Target, path: str, message: msgspec.Struct, kind: type[Reply]) -> Reply:
    # No deadline of its own: p2p_initialize registers memory, and `_link` has a deadline for all.
    return await engine.caller.post(engine.pool, f"/distserve/{path}", message, kind, 600.0)


async def _drop(local: Target, remote: Target, timeout_s: float) -> None:
    call = _Drop(_id(local.pool), _id(remote.pool))
    try:
        await local.caller.post(local.pool, "/distserve/p2p_drop_connect", call, _Dropped, timeout_s)
    except Unreachable:
        return


def _check(path: str, engine: Target, status: int) -> None:
    if status != SUCCESS:
        raise CallRefused(f"{_id(engine.pool)} answered {path} with status {status}")
