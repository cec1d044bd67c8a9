"""The prefill side of a hand-over: who may read which blocks, until when. No I/O, no clock.

A lease is granted when a prefill is done and ends in exactly one way; its end frees the blocks. COMMIT both
validates and releases: it is answered `ok` only while the lease is live, so everything read before is certified.
Ended leases leave a tombstone, from which repeated calls are answered the same.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from enum import StrEnum

# Remembered ends. A retry arrives within seconds; this bounds memory whatever happens.
_MAX_TOMBSTONES = 4096


class LeaseState(StrEnum):
    """Live states, then the ways a lease can end."""

    HELD = "held"
    CLAIMED = "claimed"
    COMMITTED = "committed"
    RELEASED = "released"
    EXPIRED = "expired"
    HOLDER_DIED = "holder_died"


LIVE = (LeaseState.HELD, LeaseState.CLAIMED)


@dataclass(frozen=True, slots=True)
class Lease:
    """`deadline` and `granted_at` in seconds of the boot clock; `holder` is a decode engine's id once claimed."""

    lease_id: str
    request_id: str
    num_blocks: int
    granted_at: float
    deadline: float
    state: LeaseState = LeaseState.HELD
    holder: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer to a call. `freed` names the request whose blocks the core must free now, if any."""

    ok: bool
    reason: str = ""
    freed: str | None = None


class LeaseTable:
    """All leases of one engine start (epoch). Every method takes `now`, boot-clock seconds."""

    def __init__(self, epoch: str, lease_s: float) -> None:
        self.epoch = epoch
        self.lease_s = lease_s
        self.ended: dict[LeaseState, int] = {state: 0 for state in LeaseState if state not in LIVE}
        self._live: dict[str, Lease] = {}
        self._tombstones: OrderedDict[str, Lease] = OrderedDict()
        self._granted = 0

    def live(self) -> list[Lease]:
        """Live leases, oldest first."""
        return list(self._live.values())

    def grant(self, request_id: str, num_blocks: int, now: float) -> Lease:
        """A new lease over a finished prefill's blocks."""
        self._granted += 1
        lease = Lease(f"{self.epoch}.{self._granted}", request_id, num_blocks, now, now + self.lease_s)
        self._live[lease.lease_id] = lease
        return lease

    def claim(self, lease_id: str, epoch: str, holder: str, now: float) -> Verdict:
        """`holder` will read. A repeated claim by the same holder is fine; a second holder is refused."""
        lease = self._find(lease_id, epoch, now)
        if isinstance(lease, Verdict):
            return lease
        if lease.holder not in (None, holder):
            return Verdict(False, f"lease {lease_id} is claimed by {lease.holder}")
        claimed = replace(lease, state=LeaseState.CLAIMED, holder=holder, deadline=now + self.lease_s)
        self._live[lease_id] = claimed
        return Verdict(True)

    def renew(self, lease_ids: list[str], epoch: str, holder: str, now: float) -> list[str]:
        """Extend the leases that `holder` claimed; returns those that are not its live leases any more."""
        gone = []
        for lease_id in lease_ids:
            lease = self._find(lease_id, epoch, now)
            if isinstance(lease, Verdict) or lease.holder != holder:
                gone.append(lease_id)
            else:
                self._live[lease_id] = replace(lease, deadline=max(lease.deadline, now + self.lease_s))
        return gone

    def commit(self, lease_id: str, epoch: str, holder: str, now: float) -> Verdict:
        """Certify what `holder` read, and release. Only a live lease claimed by `holder` is certified."""
        tomb = self._tombstones.get(lease_id)
        if tomb and epoch == self.epoch and tomb.state is LeaseState.COMMITTED and tomb.holder == holder:
            return Verdict(True, "already committed")
        lease = self._find(lease_id, epoch, now)
        if isinstance(lease, Verdict):
            return lease
        if lease.holder != holder:
            return Verdict(False, f"lease {lease_id} is not claimed by {holder}")
        return self._end(lease, LeaseState.COMMITTED)

    def release(self, lease_id: str, epoch: str, now: float) -> Verdict:
        """Nobody will read this any more. Idempotent."""
        lease = self._find(lease_id, epoch, now)
        if isinstance(lease, Verdict):
            return Verdict(epoch == self.epoch and lease_id in self._tombstones, lease.reason)
        return self._end(lease, LeaseState.RELEASED)

    def release_holder(self, holder: str) -> list[Verdict]:
        """`holder` is known to be dead: end everything it claimed."""
        mine = [lease for lease in self._live.values() if lease.holder == holder]
        return [self._end(lease, LeaseState.HOLDER_DIED) for lease in mine]

    def expire(self, now: float) -> list[Verdict]:
        """End every lease past its deadline."""
        late = [lease for lease in self._live.values() if lease.deadline <= now]
        return [self._end(lease, LeaseState.EXPIRED) for lease in late]

    def next_deadline(self) -> float | None:
        """When `expire` will next have something to do."""
        return min((lease.deadline for lease in self._live.values()), default=None)

    def audit(self) -> None:
        """Each granted lease is live or was counted as ended once; states fit where they are kept."""
        assert len(self._live) + sum(self.ended.values()) == self._granted, "a lease is lost or ended twice"
        assert not self._live.keys() & self._tombstones.keys(), "a lease is both live and ended"
        for lease in self._live.values():
            assert lease.state in LIVE
            assert (lease.holder is not None) == (lease.state is LeaseState.CLAIMED)

    def _find(self, lease_id: str, epoch: str, now: float) -> Lease | Verdict:
        """The live lease, or why there is none. A lease past its deadline is dead even before `expire` ran:
        a process that was frozen must not certify what it can no longer vouch for."""
        if epoch != self.epoch:
            return Verdict(False, f"epoch {epoch} is over; this engine runs epoch {self.epoch}")
        lease = self._live.get(lease_id)
        if lease is None:
            tomb = self._tombstones.get(lease_id)
            return Verdict(False, f"lease {lease_id} has ended: {tomb.state}" if tomb else f"unknown lease {lease_id}")
        if lease.deadline <= now:
            return Verdict(False, f"lease {lease_id} is past its deadline")
        return lease

    def _end(self, lease: Lease, state: LeaseState) -> Verdict:
        del self._live[lease.lease_id]
        self._tombstones[lease.lease_id] = replace(lease, state=state)
        self.ended[state] += 1
        while len(self._tombstones) > _MAX_TOMBSTONES:
            self._tombstones.popitem(last=False)
        return Verdict(True, state.value, freed=lease.request_id)
