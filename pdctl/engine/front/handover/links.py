"""The links to peers: by which transport this engine reads their KV, and how fast."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

import msgspec

from pdctl.engine.cache.layout import mismatch
from pdctl.engine.front.core_client import CoreClient
from pdctl.engine.front.handover.peers import Peers
from pdctl.engine.ipc.messages import Connect, Linked
from pdctl.net.http_client import Unreachable
from pdctl.wire import LinkCall, LinkInfo, LinkReply, PeerAddress

# Number of transfers that the speed is averaged over, and of links made at once.
_RECENT = 16
_AT_ONCE = 16
_LINK_S = 10.0


@dataclass(slots=True)
class _Link:
    info: LinkInfo
    pulls: int = 0
    bytes: int = 0
    recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_RECENT))
    decided: asyncio.Event = field(default_factory=asyncio.Event)


class LinkBook:
    """One link per peer, made at the supervisor's request or with the first pull."""

    def __init__(self, peers: Peers, core: CoreClient) -> None:
        self._peers = peers
        self._core = core
        self._links: dict[str, _Link] = {}
        self._addresses: dict[str, PeerAddress] = {}
        self._slots = asyncio.Semaphore(_AT_ONCE)
        core.on_linked = self._linked

    async def make(self, call: LinkCall) -> LinkReply:
        """Link to all given peers concurrently. On return, each is linked, refused or unreachable."""
        self._addresses |= {peer.name: peer for peer in call.peers}
        async with asyncio.TaskGroup() as tasks:
            made = [tasks.create_task(self._make(peer)) for peer in call.peers]
        return LinkReply([task.result() for task in made])

    def pulled(self, peer: str, num_bytes: int, seconds: float) -> None:
        """Count a finished pull."""
        link = self._links.get(peer)
        if link is not None:
            link.pulls += 1
            link.bytes += num_bytes
            link.recent.append((num_bytes, seconds))

    def speed(self, peer: str) -> float:
        """Bytes per second over the last transfers from a peer; 0 before the first."""
        link = self._links.get(peer)
        return _speed(link) if link is not None else 0.0

    def addresses(self) -> list[PeerAddress]:
        """The peers' last addresses, as the supervisor gave them."""
        return list(self._addresses.values())

    def infos(self) -> list[LinkInfo]:
        """All links, for display."""
        return [_described(link) for link in self._links.values()]

    async def _make(self, peer: PeerAddress) -> LinkInfo:
        async with self._slots:
            link = self._link(peer.name, peer.epoch)
            try:
                async with asyncio.timeout(_LINK_S):
                    await self._connect(peer, link)
            except TimeoutError:
                link.info = LinkInfo(peer.name, peer.epoch, error=f"no link within {_LINK_S:g} s")
            except Unreachable as failure:
                link.info = LinkInfo(peer.name, peer.epoch, error=str(failure))
            return _described(link)

    async def _connect(self, peer: PeerAddress, link: _Link) -> None:
        found = await self._peers.endpoint(peer.host, peer.port)
        ready = self._core.ready
        if ready is None or found.epoch != peer.epoch:
            link.info = LinkInfo(peer.name, peer.epoch, error=f"it now runs epoch {found.epoch}")
            return
        if reason := mismatch(ready.endpoint.manifest, found.endpoint.manifest):
            link.info = LinkInfo(peer.name, peer.epoch, error=f"its KV does not fit: {reason}", refused=True)
            return
        link.decided.clear()
        await self._core.send(Connect(peer.name, peer.epoch, found.endpoint))
        await link.decided.wait()

    def _link(self, peer: str, epoch: str) -> _Link:
        """The peer's link in this epoch. A restarted peer is linked again and keeps its counts."""
        old = self._links.get(peer)
        if old is None or old.info.epoch != epoch:
            new = _Link(LinkInfo(peer, epoch))
            if old is not None:
                new.pulls, new.bytes, new.recent = old.pulls, old.bytes, old.recent
            self._links[peer] = new
        return self._links[peer]

    def _linked(self, message: Linked) -> None:
        link = self._link(message.link.peer, message.link.epoch)
        link.info = message.link
        link.decided.set()


def _speed(link: _Link) -> float:
    moved, seconds = sum(b for b, _ in link.recent), sum(s for _, s in link.recent)
    return moved / seconds if seconds else 0.0


def _described(link: _Link) -> LinkInfo:
    gbps = round(_speed(link) / 1e9, 3)
    return msgspec.structs.replace(link.info, pulls=link.pulls, bytes=link.bytes, gbps=gbps)
