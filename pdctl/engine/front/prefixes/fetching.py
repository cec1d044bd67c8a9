"""Fetches KV of a prompt's beginning from a peer that has it."""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from uuid import uuid4

from pdctl.engine.front.core_client import CoreClient
from pdctl.engine.front.handover.links import LinkBook
from pdctl.engine.front.handover.peers import Abandoned, Peers, of_offer
from pdctl.engine.front.handover.receiver import KvLost, Receiver
from pdctl.engine.front.prefixes.directory import Directory
from pdctl.engine.front.prefixes.prompt import Prompt, Totals, Way, patience_s
from pdctl.engine.ipc.messages import Ready
from pdctl.net.http_client import Unreachable
from pdctl.wire import Offer, PeerAddress, PrefixCall

_log = logging.getLogger(__name__)

# Until a peer was read from: bytes per second; and what a fetch takes beside its bytes, seconds.
_USUAL_SPEED, _USUAL_EXTRA_S = 1e9, 0.01
# Weight of the newest sample in the average of what a fetch takes beside its bytes.
_ALPHA = 0.3
# A peer from which one failed is left alone for a while, seconds.
_AVOIDED_S = 5.0


class PrefixFetcher:
    """See Source: all peers of this engine."""

    def __init__(
        self, core: CoreClient, directory: Directory, peers: Peers, links: LinkBook, receiver: Receiver
    ) -> None:
        self.totals = Totals()
        self._core = core
        self._directory = directory
        self._peers = peers
        self._links = links
        self._receiver = receiver
        self._extra_s = _USUAL_EXTRA_S
        self._avoided: dict[str, float] = {}

    async def ways(self, prompt: Prompt) -> list[Way]:
        """See Source.ways: the peer that has most of it, if one has more than this engine."""
        found = self._directory.best(prompt.short_names(), self._shunned())
        if found is None:
            return []
        peer, count = found
        own = prompt.own(count)
        if count <= own:
            return []
        size = prompt.block_size
        seconds = self._predicted_s(peer, (count - own) * size)
        tokens = list(prompt.token_ids[: count * size])
        return [Way(count, seconds, partial(self._fetch, peer, tokens, prompt.salt, own * size))]

    async def _fetch(self, peer: PeerAddress, token_ids: list[int], salt: str, own: int) -> None:
        began = time.monotonic()
        until = began + patience_s(self._predicted_s(peer, len(token_ids) - own))
        try:
            offer = await self._borrowed(peer, token_ids, salt, until)
            if offer is None:
                return
            if not own < offer.num_tokens <= len(token_ids) or not self._fits(offer):
                # What it has told is not so any more, or of no use here.
                self._peers.release_later(of_offer(offer))
                self._avoid(peer)
                return
            await self._receiver.fetch(offer, token_ids[: offer.num_tokens], salt, until - time.monotonic())
        except (KvLost, Unreachable, TimeoutError) as failure:
            _log.info("the beginning of a prompt is computed here: %s", failure or f"{peer.name} does not answer")
            self._avoid(peer)
            self.totals.lost += 1
            return
        self._note(peer, offer, own, time.monotonic() - began)

    async def _borrowed(self, peer: PeerAddress, token_ids: list[int], salt: str, until: float) -> Offer | None:
        """A loan, or None. Raises Unreachable, TimeoutError; whatever the peer grants after that is given back."""
        attempt, is_answered = uuid4().hex, False
        try:
            async with asyncio.timeout(until - time.monotonic()):
                call = PrefixCall(self._peers.holder, attempt, token_ids, salt)
                reply = await self._peers.prefix(peer.host, peer.port, call)
                is_answered = True
                return reply.offer
        finally:
            if not is_answered:
                self._peers.release_later(Abandoned(peer.host, peer.port, attempt))

    def _fits(self, offer: Offer) -> bool:
        """Whether the KV can be found here afterwards: one that computes in segments finds those of others only if they
        do, too."""
        ours = self._ready.endpoint.manifest.segment
        return not ours or offer.endpoint.manifest.segment == ours

    def _note(self, peer: PeerAddress, offer: Offer, own: int, seconds: float) -> None:
        tokens = offer.num_tokens - own
        self.totals.note(tokens)
        extra_s = max(0.0, seconds - self._copy_s(peer, tokens))
        self._extra_s += _ALPHA * (extra_s - self._extra_s)

    @property
    def _ready(self) -> Ready:
        assert self._core.ready is not None
        return self._core.ready

    def _predicted_s(self, peer: PeerAddress, tokens: int) -> float:
        return self._extra_s + self._copy_s(peer, tokens)

    def _copy_s(self, peer: PeerAddress, tokens: int) -> float:
        ready = self._ready
        return tokens / ready.block_size * ready.block_bytes / (self._links.speed(peer.name) or _USUAL_SPEED)

    def _avoid(self, peer: PeerAddress) -> None:
        self._avoided[peer.name] = time.monotonic() + _AVOIDED_S

    def _shunned(self) -> frozenset[str]:
        now = time.monotonic()
        self._avoided = {name: until for name, until in self._avoided.items() if until > now}
        return frozenset(self._avoided)
