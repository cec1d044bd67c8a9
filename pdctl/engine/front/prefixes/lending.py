"""Lends KV that is here to a peer that asks for it: held in the core, under a lease like that of a prefill."""

from __future__ import annotations

import asyncio
from uuid import uuid4

from pdctl.engine.front.core_client import CoreClient
from pdctl.engine.front.handover.lease_desk import LeaseDesk, boot_time
from pdctl.engine.front.handover.offers import OfferDesk
from pdctl.engine.ipc.messages import Find, Found
from pdctl.wire import PrefixCall, PrefixReply

# The core answers between two steps.
_FIND_S = 2.0


class LendingDesk:
    """`lent`: how often something was lent."""

    def __init__(self, core: CoreClient, leases: LeaseDesk, desk: OfferDesk) -> None:
        self.lent = 0
        self._core = core
        self._leases = leases
        self._desk = desk

    async def lend(self, call: PrefixCall) -> PrefixReply:
        """Hold what is here, and grant a lease on it. Whatever ends the lease frees it."""
        asked_at, request_id, is_lent = boot_time(), f"lent.{uuid4().hex}", False
        events = self._core.open(request_id)
        try:
            async with asyncio.timeout(_FIND_S):
                await self._core.send(Find(request_id, call.token_ids, call.salt))
                found = await events.get()
            assert isinstance(found, Found)
            lease = None
            if found.num_tokens:
                lease = self._leases.grant(
                    request_id, len(found.block_ids), call.holder, call.attempt, asked_at=asked_at
                )
            if lease is None:
                return PrefixReply(None)
            is_lent = True
            self.lent += 1
            return PrefixReply(self._desk.make(lease, found.num_tokens, found.num_tokens, found.block_ids, False))
        except TimeoutError:
            return PrefixReply(None)
        finally:
            self._core.keep(request_id)
            if not is_lent:
                self._core.abort(request_id)
