"""Which peer has which blocks, as far as it has told. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pdctl.net.prefixes.told import Told
from pdctl.wire import BlocksCall, BlocksReply, PeerAddress


@dataclass(frozen=True, slots=True)
class _Peer:
    address: PeerAddress
    told: Told = field(default_factory=Told)


class Directory:
    """Blocks of peers by name. A peer's end, or silence, makes its blocks unknown."""

    def __init__(self) -> None:
        self._peers: dict[str, _Peer] = {}

    def follow(self, peer: PeerAddress) -> None:
        """Begin with a peer; of another start of it, nothing is known any more."""
        self._peers[peer.name] = _Peer(peer)

    def forget(self, name: str) -> None:
        """Nothing is known of a peer's blocks."""
        if (peer := self._peers.get(name)) is not None:
            peer.told.forget()

    def drop(self, name: str) -> None:
        """A peer is gone."""
        self._peers.pop(name, None)

    def call(self, name: str, wait_s: float) -> BlocksCall:
        """What to ask a peer next."""
        return self._peers[name].told.call(wait_s)

    def heard(self, name: str, reply: BlocksReply) -> bool:
        """A peer's answer; False if it does not follow what it was asked for. Of one that is gone, nothing counts."""
        peer = self._peers.get(name)
        return peer is None or peer.told.heard(reply)

    def best(self, names: Iterable[int], avoid: frozenset[str] = frozenset()) -> tuple[PeerAddress, int] | None:
        """The peer that has most of the first of these blocks, and how many; None if nobody has the first.

        Takes one name more than that at most, because each costs a digest."""
        left = [peer for name, peer in self._peers.items() if name not in avoid]
        count, best = 0, None
        for name in names if any(peer.told.names for peer in left) else ():
            left = [peer for peer in left if name in peer.told.names]
            if not left:
                break
            count, best = count + 1, left[0].address
        return (best, count) if best is not None else None

    @property
    def size(self) -> int:
        """Names that are known, of all peers."""
        return sum(len(peer.told.names) for peer in self._peers.values())
