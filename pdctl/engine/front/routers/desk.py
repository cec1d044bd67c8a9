"""What an engine keeps and fetches for routers of other projects: fields of its answers, and hand-overs by session."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from urllib.parse import urlsplit

from pdctl.engine.front.handover.lease_desk import LeaseDesk, boot_time
from pdctl.engine.front.handover.links import LinkBook
from pdctl.engine.front.handover.peers import Peers, of_hand_over
from pdctl.engine.front.routers.seal import Seal
from pdctl.engine.front.routers.sessions import SessionBook, new_session
from pdctl.engine.front.routers.transfers import Router, Transfer
from pdctl.net.http_client import Unreachable
from pdctl.net.openai.fields import MigrationRequest
from pdctl.wire import HandOver, LeaseCall, PeerAddress, SessionCall, SessionReply

_log = logging.getLogger(__name__)

_RESOLVE_S = 2.0


class RouterDesk:
    """Both sides of a hand-over that another project's router arranges."""

    def __init__(self, seal: Seal, leases: LeaseDesk, links: LinkBook, peers: Peers) -> None:
        self._seal = seal
        self._leases = leases
        self._links = links
        self._peers = peers
        self._sessions = SessionBook()

    # -- prefill -------------------------------------------------------------------------------------------

    def fields(self, router: Router, held: HandOver | None, token_ids: list[int]) -> dict[str, object]:
        """What a prefill's answer says about its KV, in the router's words. `held`: None if the output has ended."""
        if router is not Router.LMDEPLOY:
            if held is None:
                return {}
            return {"kv_transfer_params": held if router is Router.OURS else self._seal.sealed(held)}
        session = new_session() if held is None else self._sessions.keep(held, boot_time())
        return {
            # The proxy of 0.18 takes the session from the id, later ones from cache_session_id.
            "id": str(session),
            "cache_session_id": session,
            "cache_block_ids": held.remote_block_ids if held else [],
            "remote_token_ids": token_ids[-1:],
        }

    def take(self, call: SessionCall) -> SessionReply:
        """A decode engine of this run fetches a session's hand-over, to claim its lease."""
        return SessionReply(self._sessions.take(call.session))

    def free(self, session: int) -> None:
        """Release the KV of a session that no decode engine has fetched."""
        held = self._sessions.take(session)
        if held is not None:
            self._leases.release(LeaseCall(held.lease_id, held.epoch, Router.LMDEPLOY.value))

    # -- decode --------------------------------------------------------------------------------------------

    async def fetch(self, asked: MigrationRequest) -> HandOver | None:
        """The hand-over of a session at another engine; None if there is none (any more)."""
        if not asked.remote_block_ids:
            return None
        peer = await self.peer_at(asked.remote_engine_id)
        if peer is None:
            _log.warning("no KV is read from %s: it is no prefill engine of this service", asked.remote_engine_id)
            return None
        try:
            return await self._peers.session(peer.host, peer.port, asked.remote_session_id)
        except Unreachable as failure:
            _log.info("session %d of %s cannot be read: %s", asked.remote_session_id, peer.name, failure)
            return None

    async def let_go(self, transfer: Transfer) -> None:
        """Release the KV that a refused request would have read: its router will not."""
        held = transfer.hand_over
        if transfer.migration is not None:
            held = await self.fetch(transfer.migration)
        if held is not None:
            self._peers.release_later(of_hand_over(held))

    async def peer_at(self, url: str) -> PeerAddress | None:
        """The peer that a URL leads to. Calls carry the run's secret, so they go only where the supervisor said."""
        host, port = _host_and_port(url)
        near = [peer for peer in self._links.addresses() if peer.port == port]
        for peer in near:
            if peer.host == host or await _addresses(peer.host) & await _addresses(host):
                return peer
        return None


def _host_and_port(url: str) -> tuple[str, int | None]:
    try:
        parts = urlsplit(url)
        return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return "", None


async def _addresses(host: str) -> set[str]:
    """The addresses of a host; all loopback addresses count as one."""
    try:
        async with asyncio.timeout(_RESOLVE_S):
            found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, TimeoutError, UnicodeError):
        return set()
    addresses = {str(entry[4][0]).partition("%")[0] for entry in found}
    return {"loopback" if ipaddress.ip_address(address).is_loopback else address for address in addresses}
