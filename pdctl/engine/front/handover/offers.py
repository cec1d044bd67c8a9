"""The other side of reading early: leases on KV that is still computed, and offers to the engine that will read it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

import msgspec

from pdctl.engine.front.core_client import CoreClient
from pdctl.engine.front.handover.lease_desk import LeaseDesk, boot_time
from pdctl.engine.front.handover.peers import Peers
from pdctl.engine.handover.lease import Lease
from pdctl.engine.ipc.messages import Held, Progress, Submit
from pdctl.net.http_client import Unreachable
from pdctl.net.openai.fields import OfferTo
from pdctl.wire import Offer, RevokeCall

_log = logging.getLogger(__name__)

# Limit of concurrent offers. Further offers are not sent; their KV is read when the prefill is done.
_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Identity:
    """This engine's identity for its peers."""

    name: str
    epoch: str
    host: str
    port: int
    lease_s: float


class OfferDesk:
    """Creates and sends offers."""

    def __init__(
        self, identity: Identity, core: CoreClient, leases: LeaseDesk, peers: Peers, tasks: asyncio.TaskGroup
    ) -> None:
        self.identity = identity
        self.leases = leases
        self._core = core
        self._peers = peers
        self._tasks = tasks
        self._sending = 0

    def send(self, to: OfferTo, offer: Offer) -> None:
        """Send an offer without waiting. A lost offer costs time, not correctness."""
        if self._sending < _AT_ONCE:
            self._sending += 1
            self._tasks.create_task(self._send(to, offer))

    def make(self, lease: Lease, num_tokens: int, readable: int, block_ids: list[int], withdrawn: bool) -> Offer:
        """An offer of this engine, without tokens."""
        me = self.identity
        return Offer(
            me.name, me.host, me.port, lease.lease_id, me.epoch, me.lease_s, num_tokens, readable, block_ids,
            self._core.endpoint, withdrawn,
        )  # fmt: skip

    async def _send(self, to: OfferTo, offer: Offer) -> None:
        try:
            await self._peers.offer(to.host, to.port, offer)
        except Unreachable as failure:
            _log.info("the offer of lease %s did not arrive: %s", offer.lease_id, failure)
        finally:
            self._sending -= 1


class Offering:
    """The leases of one request that is handed over: an early one if it is offered, and always a final one.

    `router` and `attempt`: the calling router and its name for the call; `to`: the engine that may read early.
    """

    def __init__(self, desk: OfferDesk, submit: Submit, router: str, attempt: str, to: OfferTo | None) -> None:
        self._desk = desk
        self._submit = submit
        self._router = router
        self._attempt = attempt
        self._to = to
        self._lease: Lease | None = None
        self._block_ids: list[int] = []
        self._asked_at = boot_time()
        self._num_tokens = len(submit.token_ids)
        self._has_told_tokens = False

    def redirect(self, to: OfferTo) -> None:
        """Another engine will read the KV."""
        self._to = to

    def progress(self, done: Progress) -> None:
        """A chunk is computed: offer its KV."""
        self._block_ids = done.block_ids
        self._num_tokens = done.num_tokens or self._num_tokens
        if self._lease is None:
            self._lease = self._grant(len(done.block_ids), sealed=False)
        if self._lease is not None:
            self._tell(self._lease, done.num_computed)

    def held(self, held: Held) -> Lease | None:
        """The KV is complete: the lease of the hand-over. None if the router has given up the call."""
        leases, early = self._desk.leases, self._lease
        self._lease, self._block_ids = None, held.block_ids
        sealed = leases.seal(early.lease_id, len(held.block_ids)) if early else None
        if sealed is not None:
            self._tell(sealed, held.num_tokens)
            return sealed
        return self._grant(len(held.block_ids))

    def withdraw(self) -> None:
        """Withdraw an offer: the KV will not come, or not in these blocks. Idempotent."""
        lease, self._lease = self._lease, None
        if lease is not None:
            self._desk.leases.revoke(RevokeCall(lease.lease_id))
            self._tell(lease, 0, withdrawn=True)

    def _grant(self, num_blocks: int, sealed: bool = True) -> Lease | None:
        submit, leases = self._submit, self._desk.leases
        return leases.grant(submit.request_id, num_blocks, self._router, self._attempt, sealed, self._asked_at)

    def _tell(self, lease: Lease, readable: int, withdrawn: bool = False) -> None:
        if self._to is not None:
            offer = self._desk.make(lease, self._num_tokens, readable, self._block_ids, withdrawn)
            # Those of an answer are not known before it is held.
            if not self._has_told_tokens and self._num_tokens == len(self._submit.token_ids):
                self._has_told_tokens = True
                offer = msgspec.structs.replace(offer, token_ids=self._submit.token_ids, salt=self._submit.salt)
            self._desk.send(self._to, offer)
