"""The supervisor's view of the service's KV: links between engines, leases, and cleanup after dead processes."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Never, TypeVar

import msgspec

from pdctl.adapters import Ability, Control, Peer, Target, control, dialect
from pdctl.control_api import EngineBlocks, KvStatus, Lease, Link
from pdctl.net.http_client import ConnectionPool, Unreachable
from pdctl.net.identity import ContextFactory
from pdctl.net.internal_calls import Caller
from pdctl.plan.spec import PROXY
from pdctl.wire import EngineState, LeaseInfo, LeaseReply, LinkInfo, PeerAddress, RoleCall

Result = TypeVar("Result")

_READERS = ("decode", "hybrid")
_SERVERS = ("prefill", "hybrid")

# One call that changes something at an engine, seconds, and how often it is made.
_CALL_S = 2.0
_CALL_TRIES = 3
_STATE_S = 1.0
# Engines have it for load balancers. A connection that was idle for 30 s is not used again.
_HEALTH_PATH, _STAY_S = "/health", 20.0
# Hundreds of engines are not called at once.
_STAY_AT_ONCE = 16
# Without the secret, a proxy that lives refuses it.
_PROXY_PATH = "/pdctl/v1/pool"
# An engine needs up to 10 s per link, and makes its links concurrently.
_LINK_S = 30.0
_LINK_TRIES = 3


@dataclass(frozen=True, slots=True)
class Member:
    """One running engine: its name, kind, role, API address and epoch. `secret`: its own, if pdctl did not start it;
    `tls`: it wants certificates of the cluster; `fetches`: beginnings of prompts from others."""

    name: str
    kind: str
    role: str
    host: str
    port: int
    epoch: str
    secret: str | None = field(default=None, repr=False)
    role_epoch: int = 0
    tls: bool = False
    fetches: bool = False

    @property
    def holder(self) -> str:
        """Its holder name in lease tables."""
        return f"{self.name}@{self.epoch}"

    @property
    def control(self) -> Control:
        """The control interface of its kind."""
        return control(self.kind)

    @property
    def peer(self) -> PeerAddress:
        """Its address, for peers that read its KV."""
        return PeerAddress(self.name, self.host, self.port, self.epoch)


class KvWatch:
    """Calls to the engines of one service. `members` returns the ready engines, `attached` those that pdctl did not
    start, `remote` those of other nodes, `holders` the live holder names; `tls`: for engines that want certificates."""

    def __init__(
        self,
        secret: str,
        members: Callable[[], list[Member]],
        holders: Callable[[], set[str]],
        say: Callable[[str, str], None],
        attached: Callable[[], list[Member]] = list,
        remote: Callable[[], list[Member]] = list,
        tls: ContextFactory | None = None,
    ) -> None:
        self._tls = tls
        self.links: dict[tuple[str, str], LinkInfo] = {}
        self._members = members
        self._attached = attached
        self._remote = remote
        self._holders = holders
        self._say = say
        self._caller = Caller(secret)
        # By holder: a restarted engine counts as another one, whatever its port.
        self._pools: dict[str, ConnectionPool] = {}
        self._staying = asyncio.Semaphore(_STAY_AT_ONCE)

    # -- dead processes ------------------------------------------------------------------------------------

    async def reclaim(self, name: str, holder: str) -> None:
        """`holder` has died: have every engine release its leases now. The calls run concurrently.

        Engines of other nodes are told directly: that is faster than any registry."""
        async with asyncio.TaskGroup() as tasks:
            for member in self._able(Ability.RELEASE_BY_HOLDER, also=self._remote()):
                if member.name != name:
                    tasks.create_task(self._reclaim_at(member, holder))

    async def release_here(self, holders: Collection[str]) -> None:
        """Holders on other nodes are gone: have this node's engines release their leases."""
        async with asyncio.TaskGroup() as tasks:
            for member in self._able(Ability.RELEASE_BY_HOLDER):
                for holder in holders:
                    tasks.create_task(self._reclaim_at(member, holder))

    async def stay_connected_forever(self) -> Never:
        """Keep a connection to each engine of other nodes that is to hear of deaths: to make one then, with TLS, takes
        longer than the word itself."""
        while True:
            await asyncio.sleep(_STAY_S * (0.8 + 0.2 * random.random()))  # noqa: S311 - jitter, no secret
            async with asyncio.TaskGroup() as tasks:
                for member in self._remote():
                    if Ability.RELEASE_BY_HOLDER in member.control.abilities:
                        tasks.create_task(self._stay_connected(member))

    async def _stay_connected(self, member: Member) -> None:
        # Who does not answer is told by new connections, with tries.
        async with self._staying:
            with contextlib.suppress(Unreachable):
                await self.target(member).pool.request("GET", _HEALTH_PATH, timeout_s=_CALL_S)

    async def _reclaim_at(self, member: Member, holder: str) -> None:
        try:
            released = await _retried(lambda: member.control.release_holder(self.target(member), holder, _CALL_S))
        except Unreachable as failure:
            reason = f"could not release the leases of {holder} on {member.name} ({failure}); they will expire"
            self._say("pdctl", reason)
            return
        if released:
            self._say(member.name, f"released {released} leases of {holder}")

    # -- roles and links -----------------------------------------------------------------------------------

    async def tell_role(self, name: str) -> None:
        """Set the role of an engine that has just become ready, if its kind supports that."""
        for member in self._able(Ability.ROLE):
            if member.name == name:
                await self._tell_role(member)

    async def _tell_role(self, member: Member) -> None:
        try:
            call = RoleCall(member.role, member.role_epoch)
            await _retried(lambda: member.control.set_role(self.target(member), call, _CALL_S))
        except Unreachable as failure:
            self._say(member.name, f"did not accept the role {member.role}: {failure}")

    def pairs_of(self, name: str) -> list[tuple[Member, Member]]:
        """The (reader, server) pairs of ready engines that include this one, of kinds that keep their links. Readers of
        other nodes are linked there."""
        able = self._able(Ability.LINK, also=self._remote())
        members = [member for member in able if Ability.STATE in member.control.abilities]
        far = {member.name for member in self._remote()}
        pairs = [pair for pair in pairs_among(members) if name in (pair[0].name, pair[1].name)]
        return [pair for pair in pairs if pair[0].name not in far]

    async def link(self, name: str) -> None:
        """Make the links of an engine that has just become ready. The results are in `links`."""
        by_reader: dict[Member, list[Member]] = {}
        for reader, server in self.pairs_of(name):
            by_reader.setdefault(reader, []).append(server)
        async with asyncio.TaskGroup() as tasks:
            for reader, servers in by_reader.items():
                tasks.create_task(self._link_from(reader, servers))
        await self._introduce()

    async def _introduce(self) -> None:
        """Tell the engines here that fetch beginnings of prompts which others run."""
        able = self._able(Ability.NEIGHBOURS, also=self._remote())
        far = {member.name for member in self._remote()}
        async with asyncio.TaskGroup() as tasks:
            for member in able:
                if member.fetches and member.name not in far:
                    others = [one.peer for one in able if one.kind == member.kind and one.name != member.name]
                    tasks.create_task(self._introduce_to(member, others))

    async def _introduce_to(self, member: Member, others: list[PeerAddress]) -> None:
        try:
            await _retried(lambda: member.control.meet(self.target(member), others, _CALL_S))
        except Unreachable as failure:
            self._say(member.name, f"was not told which engines run: {failure}")

    def refused(self) -> str | None:
        """A message about a pair that can never work, or None."""
        for (reader, server), link in self.links.items():
            if link.refused:
                return f"{reader} cannot use the KV of {server}: {link.error}"
        return None

    async def _link_from(self, reader: Member, servers: list[Member]) -> None:
        peers = [Peer(server.peer, self.target(server)) for server in servers]
        for attempt in range(_LINK_TRIES):
            try:
                made = await reader.control.link(self.target(reader), peers, _LINK_S)
            except Unreachable as failure:
                made = [LinkInfo(peer.address.name, peer.address.epoch, error=str(failure)) for peer in peers]
            for link in made:
                self.note(reader.name, link)
            peers = [peer for peer, link in zip(peers, made, strict=False) if link.error and not link.refused]
            if not peers:
                return
            await asyncio.sleep(0.2 * 2**attempt * random.random())  # noqa: S311 - jitter, no secret

    def note(self, reader: str, link: LinkInfo) -> None:
        """Keep a link's state, and report what is new about it."""
        before = self.links.get((reader, link.peer))
        self.links[reader, link.peer] = link
        if link.error and (before is None or before.error != link.error):
            self._say(reader, f"no link to {link.peer}: {link.error}")
        elif link.fallback and (before is None or before.fallback != link.fallback):
            self._say(reader, f"link to {link.peer}: FALLBACK to {link.protocol}: {link.fallback}")

    # -- state ---------------------------------------------------------------------------------------------

    async def states(self) -> dict[str, EngineState | str]:
        """The state of every ready engine whose kind reports it, or the reason why it is missing."""
        members = self._able(Ability.STATE)
        found = await asyncio.gather(*(self._state(member) for member in members))
        # An engine remembers peers that are not part of the service any more.
        peers = {member.name for member in self._everybody()} | {peer for _, peer in self.links}
        for member, state in zip(members, found, strict=True):
            if isinstance(state, EngineState):
                for link in (link for link in state.links if link.peer in peers):
                    self.note(member.name, _kept(link, self.links.get((member.name, link.peer))))
        return {member.name: state for member, state in zip(members, found, strict=True)}

    async def leases(self) -> KvStatus:
        """The answer of `pdctl kv --json`."""
        return self.status_of(await self.states())

    def status_of(self, states: Mapping[str, EngineState | str]) -> KvStatus:
        """The same, of states that are known."""
        return KvStatus(
            engines=tuple(_blocks(name, state) for name, state in states.items() if isinstance(state, EngineState)),
            leases=tuple(
                self._lease(name, lease)
                for name, state in states.items()
                if isinstance(state, EngineState)
                for lease in state.leases
            ),
            unreachable={name: state for name, state in states.items() if isinstance(state, str)},
        )

    async def revoke(self, lease_id: str) -> LeaseReply:
        """Revoke a lease."""
        reasons = []
        for member in self._able(Ability.REVOKE):
            if not lease_id.startswith(f"{member.epoch}."):
                continue
            try:
                return await member.control.revoke(self.target(member), lease_id, _CALL_S)
            except Unreachable as failure:
                reasons.append(str(failure))
        return LeaseReply(False, "; ".join(reasons) or f"no running engine granted lease {lease_id}")

    async def epoch_of(self, member: Member) -> str | None:
        """The epoch with which an engine or a proxy of another node answers; None if it does not. What does not tell
        its epoch answers for the start that is known."""
        if member.kind != PROXY and Ability.STATE in member.control.abilities:
            found = await self._state(member)
            return found.epoch if isinstance(found, EngineState) else None
        path = _PROXY_PATH if member.kind == PROXY else dialect(member.kind).probe_path
        try:
            answer = await self.target(member).pool.request("GET", path, timeout_s=_STATE_S)
        except Unreachable:
            return None
        return member.epoch if answer.status < 500 else None

    async def state_of(self, name: str) -> EngineState | str:
        """One engine's state, or the reason why it is missing."""
        member = next((member for member in self._members() if member.name == name), None)
        if member is None:
            return f"{name} is not running"
        if Ability.STATE not in member.control.abilities:
            return f"engines of kind {member.kind!r} do not report their state"
        return await self._state(member)

    def forget(self, name: str) -> None:
        """Remove the links of an engine that is no longer part of the service."""
        self.links = {pair: link for pair, link in self.links.items() if name not in pair}

    def forget_pair(self, pair: tuple[str, str]) -> None:
        """Remove one link."""
        self.links.pop(pair, None)

    def close(self) -> None:
        """Close every connection."""
        self._close_but(set())

    # -- parts ---------------------------------------------------------------------------------------------

    def _lease(self, engine: str, lease: LeaseInfo) -> Lease:
        """Convert a lease. `leak` is computed here: the supervisor knows which holders are alive, but the engine only
        knows which ones are silent."""
        leak = lease.leak if lease.holder in self._holders() else "its holder is gone"
        return Lease(**(msgspec.structs.asdict(lease) | {"engine": engine, "leak": leak}))

    def _able(self, ability: Ability, also: Sequence[Member] = ()) -> list[Member]:
        """Ready engines, those in `also` too, whose kind has the ability. A role says nothing about leases: streams
        that move have them, and an engine may have had another role."""
        return [member for member in (*self._members(), *also) if ability in member.control.abilities]

    def _everybody(self) -> list[Member]:
        return [*self._members(), *self._attached(), *self._remote()]

    async def _state(self, member: Member) -> EngineState | str:
        try:
            return await member.control.state(self.target(member), _STATE_S)
        except Unreachable as failure:
            return str(failure)

    def target(self, member: Member) -> Target:
        """How the supervisor reaches an engine."""
        pool = self._pools.get(member.holder)
        if pool is None:
            self._close_but({member.holder for member in self._everybody()} | {member.holder})
            pool = ConnectionPool(member.host, member.port, tls=self._tls if member.tls else None)
            self._pools[member.holder] = pool
        return Target(pool, self._caller if member.secret is None else Caller(member.secret))

    def _close_but(self, kept: set[str]) -> None:
        """Close connections to all engines except `kept`."""
        for holder in self._pools.keys() - kept:
            self._pools.pop(holder).close()


async def _retried(call: Callable[[], Awaitable[Result]]) -> Result:
    """The result of an idempotent call, made again after a failure. Raises the last Unreachable."""
    for attempt in range(_CALL_TRIES - 1):
        try:
            return await call()
        except Unreachable:
            await asyncio.sleep(0.05 * 2**attempt * random.random())  # noqa: S311 - jitter, no secret
    return await call()


def pairs_among(members: list[Member]) -> list[tuple[Member, Member]]:
    """The (reader, server) pairs of these engines."""
    return [
        (reader, server)
        for reader in members
        for server in members
        if reader.role in _READERS
        and server.role in _SERVERS
        and reader.kind == server.kind
        and reader.name != server.name
    ]


def _kept(now: LinkInfo, before: LinkInfo | None) -> LinkInfo:
    """The engine's own view of a link, except that a known refusal is kept."""
    return before if before is not None and before.refused and before.epoch == now.epoch else now


def _blocks(name: str, state: EngineState) -> EngineBlocks:
    return EngineBlocks(
        name=name,
        blocks_total=state.blocks_total,
        blocks_free=state.blocks_free,
        blocks_cached=state.blocks_cached,
        blocks_referenced=state.blocks_referenced,
        blocks_leased=state.blocks_leased,
        blocks_quarantined=state.blocks_quarantined,
        blocks_reserved=state.blocks_reserved,
        counters=state.counters,
    )


def shown_links(links: dict[tuple[str, str], LinkInfo]) -> tuple[Link, ...]:
    """The links in the format of `pdctl status --json`."""
    return tuple(
        Link(reader=reader, **msgspec.structs.asdict(link))
        for (reader, _), link in sorted(links.items(), key=lambda item: item[0])
    )
