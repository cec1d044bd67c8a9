"""The service's KV as the supervisor sees it: links between engines, leases, and what the dead left behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import cast

import msgspec

from pdctl.net.http_client import ConnectionPool, Unreachable
from pdctl.net.internal_calls import Caller, Reply
from pdctl.wire import (
    EngineState,
    HolderCall,
    HolderReply,
    LeaseReply,
    LinkCall,
    LinkInfo,
    LinkReply,
    PeerAddress,
    RevokeCall,
)

_READERS = ("decode", "hybrid")
_SERVERS = ("prefill", "hybrid")

_RECLAIM_S = 2.0
_RECLAIM_TRIES = 3
_STATE_S = 1.0
# An engine makes its links within 10 s each, side by side.
_LINK_S = 30.0
_LINK_TRIES = 3


@dataclass(frozen=True, slots=True)
class Member:
    """One running engine: its name, role, control address and epoch."""

    name: str
    role: str
    port: int
    epoch: str

    @property
    def holder(self) -> str:
        """Who it is to lease tables."""
        return f"{self.name}@{self.epoch}"


class KvWatch:
    """Calls to the engines of one service. `members` tells the ready ones now, `holders` all that live."""

    def __init__(
        self,
        secret: str,
        members: Callable[[], list[Member]],
        holders: Callable[[], set[str]],
        say: Callable[[str, str], None],
    ) -> None:
        self.links: dict[tuple[str, str], LinkInfo] = {}
        self._members = members
        self._holders = holders
        self._say = say
        self._caller = Caller(secret)
        self._pools: dict[int, ConnectionPool] = {}

    # -- the dead ------------------------------------------------------------------------------------------

    async def reclaim(self, name: str, holder: str) -> None:
        """We saw `holder` die: every prefill engine frees what it answered for, at once and side by side."""
        async with asyncio.TaskGroup() as tasks:
            for member in self._with(_SERVERS):
                if member.name != name:
                    tasks.create_task(self._reclaim_at(member, holder))

    async def _reclaim_at(self, member: Member, holder: str) -> None:
        for attempt in range(_RECLAIM_TRIES):
            try:
                call = HolderCall(holder)
                reply = await self._post(member, "/pdctl/v1/holders/release", call, HolderReply, _RECLAIM_S)
            except Unreachable as failure:
                reason = failure
                await asyncio.sleep(0.05 * 2**attempt * random.random())  # noqa: S311 - jitter, no secret
                continue
            if reply.released:
                self._say(member.name, f"freed {reply.released} leases of {holder}")
            return
        self._say("pdctl", f"{member.name} was not told that {holder} died ({reason}); its leases end by deadline")

    # -- links ---------------------------------------------------------------------------------------------

    def pairs_of(self, name: str) -> list[tuple[Member, Member]]:
        """(reader, server) pairs of ready engines that this one is part of."""
        return [
            (reader, server)
            for reader in self._with(_READERS)
            for server in self._with(_SERVERS)
            if reader.name != server.name and name in (reader.name, server.name)
        ]

    async def link(self, name: str) -> None:
        """Make the links of an engine that has just become ready; `links` tells how it went."""
        by_reader: dict[Member, list[Member]] = {}
        for reader, server in self.pairs_of(name):
            by_reader.setdefault(reader, []).append(server)
        async with asyncio.TaskGroup() as tasks:
            for reader, servers in by_reader.items():
                tasks.create_task(self._link_from(reader, servers))

    def refused(self) -> str | None:
        """A pair that can never work, in words."""
        for (reader, server), link in self.links.items():
            if link.refused:
                return f"{reader} cannot use the KV of {server}: {link.error}"
        return None

    async def _link_from(self, reader: Member, servers: list[Member]) -> None:
        peers = [PeerAddress(server.name, "127.0.0.1", server.port, server.epoch) for server in servers]
        for attempt in range(_LINK_TRIES):
            try:
                made = (await self._post(reader, "/pdctl/v1/links", LinkCall(peers), LinkReply, _LINK_S)).links
            except Unreachable as failure:
                made = [LinkInfo(peer.name, peer.epoch, error=str(failure)) for peer in peers]
            for link in made:
                self._note(reader.name, link)
            peers = [peer for peer, link in zip(peers, made, strict=False) if link.error and not link.refused]
            if not peers:
                return
            await asyncio.sleep(0.2 * 2**attempt * random.random())  # noqa: S311 - jitter, no secret

    def _note(self, reader: str, link: LinkInfo) -> None:
        before = self.links.get((reader, link.peer))
        self.links[reader, link.peer] = link
        if link.error and (before is None or before.error != link.error):
            self._say(reader, f"no link to {link.peer}: {link.error}")
        elif link.fallback and (before is None or before.fallback != link.fallback):
            self._say(reader, f"link to {link.peer}: FALLBACK to {link.protocol}: {link.fallback}")

    # -- what there is -------------------------------------------------------------------------------------

    async def states(self) -> dict[str, EngineState | str]:
        """Every ready engine's state, or why there is none."""
        members = self._members()
        found = await asyncio.gather(*(self._state(member) for member in members))
        for member, state in zip(members, found, strict=True):
            if isinstance(state, EngineState):
                for link in state.links:
                    self._note(member.name, _kept(link, self.links.get((member.name, link.peer))))
        return {member.name: state for member, state in zip(members, found, strict=True)}

    async def leases(self) -> dict[str, object]:
        """As `pdctl kv --json` shows them."""
        states = await self.states()
        engines, leases = [], []
        for name, state in states.items():
            if isinstance(state, str):
                continue
            shown = msgspec.to_builtins(state)
            engines.append({"name": name, **{key: shown[key] for key in shown if key.startswith("blocks_")}})
            leases += [{**lease, "engine": name, "leak": self._leak(lease)} for lease in shown["leases"]]
        unreachable = {name: state for name, state in states.items() if isinstance(state, str)}
        return {"engines": engines, "leases": leases, "unreachable": unreachable}

    async def revoke(self, lease_id: str) -> LeaseReply:
        """Take a lease back from whoever holds it."""
        reasons = []
        for member in self._with(_SERVERS):
            if not lease_id.startswith(f"{member.epoch}."):
                continue
            try:
                call = RevokeCall(lease_id)
                return await self._post(member, "/pdctl/v1/leases/revoke", call, LeaseReply, _RECLAIM_S)
            except Unreachable as failure:
                reasons.append(str(failure))
        return LeaseReply(False, "; ".join(reasons) or f"no engine that runs now granted lease {lease_id}")

    async def state_of(self, name: str) -> EngineState | str:
        """One engine's state, or why there is none."""
        member = next((member for member in self._members() if member.name == name), None)
        return await self._state(member) if member is not None else f"{name} does not run"

    def forget(self, name: str) -> None:
        """An engine is no longer part of the service."""
        self.links = {pair: link for pair, link in self.links.items() if name not in pair}

    def close(self) -> None:
        """Close every connection."""
        for pool in self._pools.values():
            pool.close()

    # -- parts ---------------------------------------------------------------------------------------------

    def _leak(self, lease: dict[str, object]) -> str:
        """Why a lease is past its purpose: we know who lives, the engine only who is silent."""
        if lease["holder"] not in self._holders():
            return "its holder is gone"
        return str(lease["leak"])

    def _with(self, roles: Iterable[str]) -> list[Member]:
        return [member for member in self._members() if member.role in roles]

    async def _state(self, member: Member) -> EngineState | str:
        try:
            return await self._caller.get(self._pool(member), "/pdctl/v1/state", EngineState, _STATE_S)
        except Unreachable as failure:
            return str(failure)

    def _post(
        self, member: Member, path: str, call: msgspec.Struct, kind: type[Reply], timeout_s: float
    ) -> Awaitable[Reply]:
        return self._caller.post(self._pool(member), path, call, kind, timeout_s)

    def _pool(self, member: Member) -> ConnectionPool:
        return self._pools.setdefault(member.port, ConnectionPool("127.0.0.1", member.port))


def _kept(now: LinkInfo, before: LinkInfo | None) -> LinkInfo:
    """An engine's own view of a link; a refusal that we know of stays."""
    return before if before is not None and before.refused and before.epoch == now.epoch else now


def shown_links(links: dict[tuple[str, str], LinkInfo]) -> list[dict[str, object]]:
    """As `pdctl status --json` shows them."""
    return [
        {"reader": reader, **cast(dict[str, object], msgspec.to_builtins(link))}
        for (reader, _), link in sorted(links.items(), key=lambda item: item[0])
    ]
