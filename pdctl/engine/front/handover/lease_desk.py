"""Applies the lease table: grants, HTTP calls of decode engines, expiry."""

from __future__ import annotations

import asyncio
import time

from pdctl.engine.front.core_client import CoreClient
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

# Maximum delay of an expiry, seconds.
_SWEEP_S = 0.25


def boot_time() -> float:
    """Seconds since boot, including suspended time, so that leases expire while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LeaseDesk:
    """Executes the table's decisions: every ended lease frees its blocks at once."""

    def __init__(self, table: LeaseTable, core: CoreClient, trace: Trace) -> None:
        self.table = table
        self._core = core
        self._trace = trace

    def grant(
        self,
        request_id: str,
        num_blocks: int,
        holder: str,
        attempt: str,
        sealed: bool = True,
        asked_at: float | None = None,
    ) -> Lease | None:
        """Grant a lease for a finished prefill, or (not `sealed`) for a running one, that was asked for at `asked_at`
        (None: now). None if the router has given it up, or was dead by then."""
        lease = self.table.grant(request_id, num_blocks, holder, boot_time(), sealed, attempt, asked_at)
        if lease is not None:
            self._trace.write("grant", lease.lease_id, request=request_id)
        return lease

    def seal(self, lease_id: str, num_blocks: int) -> Lease | None:
        """Seal a lease: its prefill is finished. None if the lease has ended."""
        return self.table.seal(lease_id, num_blocks, boot_time())

    def claim(self, call: LeaseCall) -> LeaseReply:
        """Claim a lease: a decode engine will read its blocks."""
        return self._carry_out("claim", call, self.table.claim(call.lease_id, call.epoch, call.holder, boot_time()))

    def commit(self, call: LeaseCall) -> LeaseReply:
        """Commit a lease: a decode engine has read its blocks."""
        return self._carry_out("commit", call, self.table.commit(call.lease_id, call.epoch, call.holder, boot_time()))

    def release(self, call: LeaseCall) -> LeaseReply:
        """Release a lease: its blocks will not be read."""
        return self._carry_out("release", call, self.table.release(call.lease_id, call.epoch, boot_time()))

    def renew(self, call: RenewCall) -> RenewReply:
        """Renew leases: a decode engine is alive and still needs them."""
        return RenewReply(self.table.renew(call.lease_ids, call.epoch, call.holder, boot_time()))

    def revoke(self, call: RevokeCall) -> LeaseReply:
        """Revoke a lease, for an operator or for the prefill itself."""
        verdict = self.table.revoke(call.lease_id, boot_time())
        self._end(verdict)
        return LeaseReply(verdict.ok, verdict.reason)

    def release_holder(self, call: HolderCall) -> HolderReply:
        """End all leases of a dead decode engine or router."""
        ended = self.table.release_holder(call.holder, boot_time())
        for verdict in ended:
            self._end(verdict)
        return HolderReply(len(ended))

    def give_up(self, call: AttemptCall) -> HolderReply:
        """End the lease of a prefill call that a router has given up."""
        ended = self.table.give_up(call.attempt, boot_time())
        for verdict in ended:
            self._end(verdict)
        return HolderReply(len(ended))

    async def expire_forever(self) -> None:
        """End expired leases; if there are none, audit the table."""
        while True:
            for verdict in self.table.expire(boot_time()):
                self._end(verdict)
            if not self.table.live():
                self.table.audit()
            await asyncio.sleep(_SWEEP_S)

    def block_seconds(self) -> tuple[float, float]:
        """Blocks times seconds so far: leased, and the leaked part of these."""
        return self.table.block_seconds(boot_time())

    def infos(self, block_bytes: int) -> list[LeaseInfo]:
        """Live leases for display."""
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
        """Free the blocks of an ended lease."""
        if verdict.lease_id:
            self._trace.write("ended", verdict.lease_id, how=verdict.reason)
        if verdict.freed is not None:
            self._core.abort(verdict.freed)
