"""Which transport carries a pair's KV, and why. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from pdctl.wire import PoolEndpoint, Served

# By cost of a byte on one host, and by bandwidth between hosts (figures in docs/performance.md).
_SAME_HOST = ("shm", "nixl", "mooncake")
_FAR = ("mooncake", "nixl")


@dataclass(frozen=True, slots=True)
class Chosen:
    """The transport, where it reads, why it was taken, and a fallback worth a loud mark ("" for none)."""

    transport: str
    address: str
    protocol: str
    reason: str
    fallback: str


def choose(backend: str, host_id: str, ours: dict[str, str], fallbacks: dict[str, str], peer: PoolEndpoint) -> Chosen:
    """Pick for one peer. `ours`: transport -> protocol, of those open here. `backend`: what the topology asked for.

    Raises ValueError with a sentence when the two sides have nothing in common.
    """
    near = peer.host_id == host_id
    order = _SAME_HOST if near else _FAR
    theirs = {served.transport: served for served in peer.served}
    common = [name for name in order if name in ours and name in theirs]
    if backend in ("shm", *_FAR) and backend not in common:
        raise ValueError(_nothing(backend, near, ours, theirs))
    if not common:
        raise ValueError(_nothing("auto", near, ours, theirs))
    where = "the peer is on this host" if near else "the peer is on another host"
    name = common[0] if backend == "auto" else backend
    reason = f"{where}; both have {', '.join(common)}" if backend == "auto" else "named in the topology"
    protocol, fallback = _agreed(ours[name], theirs[name])
    return Chosen(name, theirs[name].address, protocol, reason, fallbacks.get(name, "") or fallback)


def _agreed(ours: str, theirs: Served) -> tuple[str, str]:
    """The protocol both sides can carry, and what was lost by that."""
    if ours == theirs.protocol:
        return ours, theirs.fallback
    if "rdma" in (ours, theirs.protocol):
        return "tcp", theirs.fallback or "one side has RDMA and the other has not"
    return theirs.protocol, theirs.fallback


def _nothing(backend: str, near: bool, ours: dict[str, str], theirs: dict[str, Served]) -> str:
    wanted = "no transport is open on both sides" if backend == "auto" else f"{backend} is not open on both sides"
    if backend == "shm" and not near:
        wanted = "shm reaches this host only, and the peer is on another"
    return f"{wanted}: here {', '.join(ours) or 'none'}; there {', '.join(theirs) or 'none'}"
