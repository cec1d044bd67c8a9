"""Which peer has which blocks, as far as it has told. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pdctl.wire import BlocksReply, PeerAddress


@dataclass(slots=True)
class _Known:
    address: PeerAddress
    epoch: str = ""
    sequence: int = 0
    names: set[int] = field(default_factory=set)


class Directory:
    """Blocks of peers by name. A peer's end, or silence, makes its blocks unknown."""

    def __init__(self) -> None:
        self._peers: dict[str, _Known] = {}

    def follow(self, peer: PeerAddress) -> None:
        """Begin with a peer; of another start of it, nothing is known any more."""
        self._peers[peer.name] = _Known(peer)

    def forget(self, name: str) -> None:
        """Nothing is known of a peer's blocks."""
        known = self._peers.get(name)
        if known is not None:
            self._peers[name] = _Known(known.address)

    def drop(self, name: str) -> None:
        """A peer is gone."""
        self._peers.pop(name, None)

    def place(self, name: str) -> tuple[str, int]:
        """The start of a peer, and its change up to which its blocks are known."""
        known = self._peers[name]
        return known.epoch, known.sequence

    def heard(self, name: str, reply: BlocksReply) -> None:
        """A peer has told what changed, after what it was asked for. An answer that does not follow what is known makes
        its blocks unknown."""
        known = self._peers.get(name)
        if known is None:
            return
        if reply.whole:
            known.names = set(reply.stored)
        elif reply.epoch == known.epoch and reply.sequence >= known.sequence:
            known.names.update(reply.stored)
            known.names.difference_update(reply.removed)
        else:
            self.forget(name)
            return
        known.epoch, known.sequence = reply.epoch, reply.sequence

    def best(self, names: Iterable[int], avoid: frozenset[str] = frozenset()) -> tuple[PeerAddress, int] | None:
        """The peer that has most of the first of these blocks, and how many; None if nobody has the first.

        Takes one name more than that at most, because each costs a digest."""
        left = [known for name, known in self._peers.items() if name not in avoid]
        count, best = 0, None
        for name in names if any(known.names for known in left) else ():
            left = [known for known in left if name in known.names]
            if not left:
                break
            count, best = count + 1, left[0].address
        return (best, count) if best is not None else None

    @property
    def size(self) -> int:
        """Names that are known, of all peers."""
        return sum(len(known.names) for known in self._peers.values())
