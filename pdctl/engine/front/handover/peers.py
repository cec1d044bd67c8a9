"""Calls to other engines' fronts: leases, offers, endpoints. Each has a deadline; releases use a bounded queue."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from pdctl.net.http_client import ConnectionPool, Unreachable
from pdctl.net.identity import ContextFactory
from pdctl.net.internal_calls import Caller, CallRefused
from pdctl.wire import (
    AttemptCall,
    BlocksCall,
    BlocksReply,
    EndpointReply,
    HandOver,
    HolderReply,
    KvEndpoint,
    LeaseCall,
    LeaseReply,
    Offer,
    PrefixCall,
    PrefixReply,
    RenewCall,
    RenewReply,
    SessionCall,
    SessionReply,
)

_log = logging.getLogger(__name__)

# Timeout of a call, after which it is repeated or given up, seconds.
_CALL_S = 5.0
BLOCKS_PATH, PREFIX_PATH, ATTEMPTS_PATH = "/pdctl/v1/blocks", "/pdctl/v1/prefixes", "/pdctl/v1/attempts/release"
SESSION_PATH = "/pdctl/v1/sessions/take"
_MAX_PEERS = 256
_MAX_RELEASES = 1024
_RELEASES_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class LeaseRef:
    """A lease on a prefill engine, and where its blocks can be read."""

    engine: str
    host: str
    port: int
    epoch: str
    lease_id: str
    lease_s: float
    block_ids: list[int]
    endpoint: KvEndpoint

    @property
    def what(self) -> str:
        """For a log."""
        return f"lease {self.lease_id}"


@dataclass(frozen=True, slots=True)
class Abandoned:
    """A call for a loan whose answer nobody waits for any more: see PrefixCall."""

    host: str
    port: int
    attempt: str

    @property
    def what(self) -> str:
        """For a log."""
        return f"what call {self.attempt} was granted"


def of_hand_over(given: HandOver) -> LeaseRef:
    """The lease of a finished prefill."""
    return LeaseRef(
        given.remote_engine_id, given.remote_host, given.remote_port, given.epoch, given.lease_id, given.lease_s,
        given.remote_block_ids, given.endpoint,
    )  # fmt: skip


def of_offer(given: Offer) -> LeaseRef:
    """The lease of a prefill that is still running."""
    return LeaseRef(
        given.engine, given.host, given.port, given.epoch, given.lease_id, given.lease_s, given.block_ids,
        given.endpoint,
    )  # fmt: skip


class Peers:
    """Persistent connections to other engines; `holder`: this engine's name and epoch as a lease holder; `tls`: in a
    cluster with certificates, which all its engines have."""

    def __init__(self, holder: str, secret: str, tls: ContextFactory | None = None) -> None:
        self.holder = holder
        self._tls = tls
        self._caller = Caller(secret)
        self._pools: dict[tuple[str, int], ConnectionPool] = {}
        self._slots: dict[tuple[str, int], asyncio.Semaphore] = {}
        self._releasing = 0
        self._releases: asyncio.Queue[LeaseRef | Abandoned] = asyncio.Queue(_MAX_RELEASES)

    async def lease_call(self, lease: LeaseRef, verb: str) -> LeaseReply:
        """Claim, commit or release. Raises Unreachable."""
        call = LeaseCall(lease.lease_id, lease.epoch, self.holder)
        return await self._post(lease.host, lease.port, f"/pdctl/v1/leases/{verb}", call)

    async def renew(self, host: str, port: int, call: RenewCall) -> list[str]:
        """The leases that are gone. Raises Unreachable."""
        pool = self._pool(host, port)
        return (await self._caller.post(pool, "/pdctl/v1/leases/renew", call, RenewReply, _CALL_S)).gone

    async def offer(self, host: str, port: int, offer: Offer) -> LeaseReply:
        """Send an offer to a decode engine. Raises Unreachable."""
        return await self._post(host, port, "/pdctl/v1/offers", offer)

    async def endpoint(self, host: str, port: int) -> EndpointReply:
        """Where a peer's pool can be read. Raises Unreachable."""
        return await self._caller.get(self._pool(host, port), "/pdctl/v1/endpoint", EndpointReply, _CALL_S)

    async def blocks(self, host: str, port: int, call: BlocksCall, wait_s: float) -> BlocksReply:
        """What has changed in what a peer can find; `wait_s`: how long it may wait for that. Raises Unreachable."""
        return await self._caller.post(self._pool(host, port), BLOCKS_PATH, call, BlocksReply, wait_s + _CALL_S)

    async def prefix(self, host: str, port: int, call: PrefixCall) -> PrefixReply:
        """Have a peer lend the KV of a prompt's beginning. Raises Unreachable."""
        return await self._caller.post(self._pool(host, port), PREFIX_PATH, call, PrefixReply, _CALL_S)

    async def session(self, host: str, port: int, session: int) -> HandOver | None:
        """The hand-over of a session at a prefill engine, once. Raises Unreachable."""
        call = SessionCall(session)
        return (await self._caller.post(self._pool(host, port), SESSION_PATH, call, SessionReply, _CALL_S)).hand_over

    def release_later(self, lease: LeaseRef | Abandoned) -> None:
        """Release without waiting; works during cancellation. If the queue is full, the lease ends at its deadline."""
        with suppress(asyncio.QueueFull):
            self._releases.put_nowait(lease)

    async def release_forever(self) -> None:
        """Execute the calls of `release_later`. A peer that does not answer delays only its own releases."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                lease = await self._releases.get()
                slots = self._slots.setdefault((lease.host, lease.port), asyncio.Semaphore(_RELEASES_AT_ONCE))
                if self._releasing < _MAX_RELEASES:
                    self._releasing += 1
                    tasks.create_task(self._release(lease, slots))

    async def _release(self, lease: LeaseRef | Abandoned, slots: asyncio.Semaphore) -> None:
        try:
            async with slots:
                if isinstance(lease, LeaseRef):
                    await self.lease_call(lease, "release")
                else:
                    pool, call = self._pool(lease.host, lease.port), AttemptCall(lease.attempt)
                    await self._caller.post(pool, ATTEMPTS_PATH, call, HolderReply, _CALL_S)
        except Unreachable as failure:
            _log.info("%s is left to its deadline: %s", lease.what, failure)
        finally:
            self._releasing -= 1

    def close(self) -> None:
        """Close every connection."""
        for pool in self._pools.values():
            pool.close()

    async def _post(self, host: str, port: int, path: str, message: msgspec.Struct) -> LeaseReply:
        try:
            return await self._caller.post(self._pool(host, port), path, message, LeaseReply, _CALL_S)
        except CallRefused as failure:
            return LeaseReply(False, str(failure))

    def _pool(self, host: str, port: int) -> ConnectionPool:
        if (host, port) not in self._pools and len(self._pools) >= _MAX_PEERS:
            self._pools.pop(next(iter(self._pools))).close()
        return self._pools.setdefault((host, port), ConnectionPool(host, port, tls=self._tls))
