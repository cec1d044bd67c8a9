"""Choose the transport for a pair of engines, with the reason. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from pdctl.transports import FAR, NEAR, TRANSPORTS
from pdctl.wire import PoolEndpoint, Served


@dataclass(frozen=True, slots=True)
class Chosen:
    """The transport, its address, the reason for the choice, and a fallback to report ("" for none)."""

    transport: str
    address: str
    protocol: str
    reason: str
    fallback: str


def choose(backend: str, host_id: str, ours: dict[str, str], fallbacks: dict[str, str], peer: PoolEndpoint) -> Chosen:
    """Choose for one peer. `ours`: open transports here, with their protocols. `backend`: the topology's setting.

    Raises ValueError with the reason if the two sides have no transport in common.
    """
    near = peer.host_id == host_id
    order = NEAR if near else FAR
    theirs = {served.transport: served for served in peer.served}
    common = [name for name in order if name in ours and name in theirs]
    if backend != "auto" and backend not in common:
        raise ValueError(_nothing(backend, near, ours, theirs))
    if not common:
        raise ValueError(_nothing("auto", near, ours, theirs))
    where = "the peer is on this host" if near else "the peer is on another host"
    name = common[0] if backend == "auto" else backend
    reason = f"{where}; both have {', '.join(common)}" if backend == "auto" else "named in the topology"
    protocol, fallback = _agreed(ours[name], theirs[name])
    if not near:
        # Shared memory, which a library would also use, is of one host.
        protocol = protocol.removeprefix("sm+")
    return Chosen(name, theirs[name].address, protocol, reason, fallbacks.get(name, "") or fallback)


def _agreed(ours: str, theirs: Served) -> tuple[str, str]:
    """The protocol that both sides support, and the reason for a fallback."""
    if ours == theirs.protocol:
        return ours, theirs.fallback
    if "rdma" in (ours, theirs.protocol):
        return "tcp", theirs.fallback or "one side has RDMA and the other has not"
    return theirs.protocol, theirs.fallback


def _nothing(backend: str, near: bool, ours: dict[str, str], theirs: dict[str, Served]) -> str:
    wanted = "no transport is open on both sides" if backend == "auto" else f"{backend} is not open on both sides"
    if not near and backend != "auto" and not TRANSPORTS[backend].crosses_hosts:
        wanted = f"{backend} reaches this host only, and the peer is on another"
    return f"{wanted}: here {', '.join(ours) or 'none'}; there {', '.join(theirs) or 'none'}"
