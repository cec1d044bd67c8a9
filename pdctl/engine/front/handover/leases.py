"""The lease table at work: grants, HTTP calls of decode engines, expiry on time."""

from __future__ import annotations

import asyncio
import time

from pdctl.engine.front.core_link import CoreLink
from pdctl.engine.front.handover.trace import Trace
from pdctl.engine.handover.lease import Lease, LeaseTable, Verdict
from pdctl.wire import (
    AttemptCall,
    HolderCall,
    HolderReply,
    LeaseCall,
    LeaseInfo,
    LeaseReply,
    RenewCall,
    RenewReply,
    RevokeCall,
)

# An expiry is late by at most this, seconds.
_SWEEP_S = 0.25


def boot_time() -> float:
    """Seconds since boot, suspended time included: a machine that slept must not think its leases fresh."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LeaseDesk:
    """Carries out what the table decides: every ended lease frees its blocks at once."""

    def __init__(self, table: LeaseTable, core: CoreLink, trace: Trace) -> None:
        self.table = table
        self._core = core
        self._trace = trace

    def grant(self, request_id: str, num_blocks: int, holder: str, attempt: str, sealed: bool = True) -> Lease | None:
        """A lease for a prefill that is done, or (not `sealed`) on its way. None when the router has given it up."""
        lease = self.table.grant(request_id, num_blocks, holder, boot_time(), sealed, attempt)
        if lease is not None:
            self._trace.write("grant", lease.lease_id, request=request_id)
        return lease

    def seal(self, lease_id: str, num_blocks: int) -> Lease | None:
        """The prefill behind a lease is done; None when the lease has ended meanwhile."""
        return self.table.seal(lease_id, num_blocks, boot_time())

    def claim(self, call: LeaseCall) -> LeaseReply:
        """A decode engine will read."""
        return self._carry_out("claim", call, self.table.claim(call.lease_id, call.epoch, call.holder, boot_time()))

    def commit(self, call: LeaseCall) -> LeaseReply:
        """A decode engine has read."""
        return self._carry_out("commit", call, self.table.commit(call.lease_id, call.epoch, call.holder, boot_time()))

    def release(self, call: LeaseCall) -> LeaseReply:
        """Nobody will read."""
        return self._carry_out("release", call, self.table.release(call.lease_id, call.epoch, boot_time()))

    def renew(self, call: RenewCall) -> RenewReply:
        """A decode engine is alive and still wants these."""
        return RenewReply(self.table.renew(call.lease_ids, call.epoch, call.holder, boot_time()))

    def revoke(self, call: RevokeCall) -> LeaseReply:
        """An operator, or the prefill itself, takes a lease back."""
        verdict = self.table.revoke(call.lease_id, boot_time())
        self._end(verdict)
        return LeaseReply(verdict.ok, verdict.reason)

    def release_holder(self, call: HolderCall) -> HolderReply:
        """A decode engine or a router is dead."""
        ended = self.table.release_holder(call.holder, boot_time())
        for verdict in ended:
            self._end(verdict)
        return HolderReply(len(ended))

    def give_up(self, call: AttemptCall) -> HolderReply:
        """A router does not want the outcome of a prefill call any more."""
        ended = self.table.give_up(call.attempt, boot_time())
        for verdict in ended:
            self._end(verdict)
        return HolderReply(len(ended))

    async def expire_forever(self) -> None:
        """End leases whose deadline has passed; audit the books when there are none."""
        while True:
            for verdict in self.table.expire(boot_time()):
                self._end(verdict)
            if not self.table.live():
                self.table.audit()
            await asyncio.sleep(_SWEEP_S)

    def block_seconds(self) -> tuple[float, float]:
        """Blocks times seconds so far: leased, and of these leaked."""
        return self.table.block_seconds(boot_time())

    def infos(self, block_bytes: int) -> list[LeaseInfo]:
        """Live leases for people."""
        now = boot_time()
        return [
            LeaseInfo(
                id=lease.lease_id,
                request_id=lease.request_id,
                holder=lease.holder,
                state=lease.state.value,
                age_s=round(now - lease.granted_at, 3),
                quiet_s=round(now - lease.touched_at, 3),
                blocks=lease.num_blocks,
                bytes=lease.num_blocks * block_bytes,
                leak="its holder is silent" if self.table.is_quiet(lease, now) else "",
            )
            for lease in self.table.live()
        ]

    def _carry_out(self, what: str, call: LeaseCall, verdict: Verdict) -> LeaseReply:
        self._trace.write(what, call.lease_id, holder=call.holder, ok=verdict.ok)
        self._end(verdict)
        return LeaseReply(verdict.ok, verdict.reason)

    def _end(self, verdict: Verdict) -> None:
        """Free what an ended lease held."""
        if verdict.lease_id:
            self._trace.write("ended", verdict.lease_id, how=verdict.reason)
        if verdict.freed is not None:
            self._core.abort(verdict.freed)
