"""The supervisor's calls to a builtin engine's front."""

from __future__ import annotations

import msgspec

from pdctl.adapters import Ability, NoControl, Peer, Progress, Target
from pdctl.wire import (
    EngineState,
    HolderCall,
    HolderReply,
    LeaseReply,
    LinkCall,
    LinkInfo,
    LinkReply,
    NeighboursCall,
    NeighboursReply,
    PeerAddress,
    RevokeCall,
    RoleCall,
)

_decode_progress = msgspec.json.Decoder(Progress).decode


class BuiltinControl(NoControl):
    """See Control. An engine keeps its links itself, and its leases end by themselves: nothing is left to sweep."""

    abilities = frozenset(Ability) - {Ability.SWEEP}
    progress_path = "/pdctl/v1/state"

    def progress(self, body: bytes) -> Progress:
        """See Control.progress."""
        return _decode_progress(body)

    async def state(self, engine: Target, timeout_s: float) -> EngineState:
        """See Control.state."""
        return await engine.caller.get(engine.pool, "/pdctl/v1/state", EngineState, timeout_s)

    async def link(self, reader: Target, peers: list[Peer], timeout_s: float) -> list[LinkInfo]:
        """See Control.link."""
        call = LinkCall([peer.address for peer in peers])
        return (await reader.caller.post(reader.pool, "/pdctl/v1/links", call, LinkReply, timeout_s)).links

    async def meet(self, engine: Target, others: list[PeerAddress], timeout_s: float) -> None:
        """See Control.meet."""
        path = "/pdctl/v1/neighbours"
        await engine.caller.post(engine.pool, path, NeighboursCall(others), NeighboursReply, timeout_s)

    async def unlink(self, reader: Target, peer: Peer, timeout_s: float) -> None:
        """See Control.unlink. An engine forgets a link when its peer has a new epoch."""

    async def release_holder(self, engine: Target, holder: str, timeout_s: float) -> int:
        """See Control.release_holder."""
        path = "/pdctl/v1/holders/release"
        return (await engine.caller.post(engine.pool, path, HolderCall(holder), HolderReply, timeout_s)).released

    async def revoke(self, engine: Target, lease_id: str, timeout_s: float) -> LeaseReply:
        """See Control.revoke."""
        path = "/pdctl/v1/leases/revoke"
        return await engine.caller.post(engine.pool, path, RevokeCall(lease_id), LeaseReply, timeout_s)

    async def set_role(self, engine: Target, role: RoleCall, timeout_s: float) -> None:
        """See Control.set_role."""
        await engine.caller.post(engine.pool, "/pdctl/v1/role", role, RoleCall, timeout_s)


CONTROL = BuiltinControl()
