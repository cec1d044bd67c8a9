"""Follows what peers can find: one call after the other at each, which is answered when something has changed."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Never

from pdctl.engine.front.handover.peers import Peers
from pdctl.engine.front.prefixes.directory import Directory
from pdctl.net.http_client import Unreachable
from pdctl.wire import NeighboursCall, NeighboursReply, PeerAddress

_log = logging.getLogger(__name__)

# A peer that has nothing to tell answers after this long, seconds. One that is silent for longer is not believed.
_WAIT_S = 10.0
# Pauses after a failure, seconds: doubled from the first to the longest, with jitter.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0
_MOST_PEERS = 64


class Follower:
    """Keeps `directory` up to date. `tasks`: run the calls."""

    def __init__(self, peers: Peers, directory: Directory, tasks: asyncio.TaskGroup) -> None:
        self._peers = peers
        self._directory = directory
        self._tasks = tasks
        self._running: dict[PeerAddress, asyncio.Task[Never]] = {}

    def meet(self, call: NeighboursCall) -> NeighboursReply:
        """Follow these peers, and no others."""
        wanted = set(call.peers[:_MOST_PEERS])
        for peer in self._running.keys() - wanted:
            self._running.pop(peer).cancel()
            self._directory.drop(peer.name)
        for peer in wanted - self._running.keys():
            self._directory.follow(peer)
            self._running[peer] = self._tasks.create_task(self._follow_forever(peer))
        return NeighboursReply(len(self._running))

    async def _follow_forever(self, peer: PeerAddress) -> Never:
        failures = 0
        while True:
            try:
                call = self._directory.call(peer.name, _WAIT_S)
                if self._directory.heard(peer.name, await self._peers.blocks(peer.host, peer.port, call, _WAIT_S)):
                    failures = 0
                    continue
                reason = "its answer does not follow the one before"
            except Unreachable as failure:
                reason = str(failure)
                self._directory.forget(peer.name)
            if not failures:
                _log.info("what %s has is not known: %s", peer.name, reason)
            pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(failures, 10))
            await asyncio.sleep(pause_s * (0.5 + 0.5 * random.random()))  # noqa: S311 - jitter, no secret
            failures += 1
