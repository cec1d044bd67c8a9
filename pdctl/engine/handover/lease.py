"""The prefill side of a hand-over: which reader may read which blocks, until when. No I/O, no clock.

A lease is granted when a prefill is done, or while it still computes later chunks. It ends in exactly one way, and its
end frees the blocks. COMMIT validates and releases: it succeeds only while the lease is live, so everything read before
is valid. Ended leases leave a tombstone, so that repeated calls get the same answer."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from enum import StrEnum

# Limit of tombstones. A retry arrives within seconds; the limit bounds the memory.
_MAX_TOMBSTONES = 4096


class LeaseState(StrEnum):
    """Live states, then the ways a lease can end."""

    HELD = "held"
    CLAIMED = "claimed"
    COMMITTED = "committed"
    RELEASED = "released"
    EXPIRED = "expired"
    HOLDER_DIED = "holder_died"
    REVOKED = "revoked"


LIVE = (LeaseState.HELD, LeaseState.CLAIMED)
# Ends without a call by the holder: the time since its last sign of life counts as leaked.
_LEAKING = (LeaseState.EXPIRED, LeaseState.HOLDER_DIED)
# A live lease without a grant, claim or renewal for this fraction of its time counts as leaked. Holders renew four
# times per lease time or once per second, whichever is sooner.
_QUIET_PART = 0.6


@dataclass(frozen=True, slots=True)
class Lease:
    """One lease. Times are seconds of the boot clock. `holder`: first the router, then the reader that claimed it.

    `sealed`: False while the prefill still computes; blocks may be read, but not committed yet.
    `touched_at`: the last sign of life (grant, seal, claim or renewal). `attempt`: the router's name for its call.
    """

    lease_id: str
    request_id: str
    num_blocks: int
    granted_at: float
    deadline: float
    touched_at: float
    holder: str
    router: str
    attempt: str = ""
    state: LeaseState = LeaseState.HELD
    sealed: bool = True


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer to a call. `freed`: the request with blocks that the core must free now, if any; `lease_id`: the lease
    that ended."""

    ok: bool
    reason: str = ""
    freed: str | None = None
    lease_id: str = ""


class LeaseTable:
    """All leases of one engine start (epoch). Every method takes `now` in seconds of the boot clock."""

    def __init__(self, epoch: str, lease_s: float) -> None:
        self.epoch = epoch
        self.lease_s = lease_s
        self.ended: dict[LeaseState, int] = {state: 0 for state in LeaseState if state not in LIVE}
        self._live: dict[str, Lease] = {}
        self._tombstones: OrderedDict[str, Lease] = OrderedDict()
        self._given_up: OrderedDict[str, None] = OrderedDict()
        # Holders by when they were said to be dead.
        self._dead: OrderedDict[str, float] = OrderedDict()
        self._granted = 0
        self._leased_block_s = 0.0
        self._leaked_block_s = 0.0

    def live(self) -> list[Lease]:
        """Live leases, oldest first."""
        return list(self._live.values())

    def grant(
        self,
        request_id: str,
        num_blocks: int,
        holder: str,
        now: float,
        sealed: bool = True,
        attempt: str = "",
        asked_at: float | None = None,
    ) -> Lease | None:
        """Grant a lease on a prefill's blocks to the router `holder`, which asked for it at `asked_at` (None: now).
        None if the router has given up the `attempt` or is dead, because then no one would end the lease."""
        if attempt in self._given_up or self._is_dead(holder, now if asked_at is None else asked_at):
            return None
        self._granted += 1
        lease_id = f"{self.epoch}.{self._granted}"
        lease = Lease(
            lease_id, request_id, num_blocks, now, now + self.lease_s, now, holder, holder, attempt, sealed=sealed
        )
        self._live[lease_id] = lease
        return lease

    def seal(self, lease_id: str, num_blocks: int, now: float) -> Lease | None:
        """Seal a lease: the prefill is done and the lease can be committed. None if it has ended."""
        lease = self._live.get(lease_id)
        if lease is None or lease.deadline <= now:
            return None
        return self._touch(replace(lease, sealed=True, num_blocks=num_blocks), now)

    def claim(self, lease_id: str, epoch: str, holder: str, now: float) -> Verdict:
        """Claim a lease for reading. A repeated claim by the same holder is accepted; a second holder is refused."""
        lease = self._find(lease_id, epoch, now)
        if isinstance(lease, Verdict):
            return lease
        if self._is_dead(holder, now):
            return Verdict(False, f"{holder} is known to be dead")
        if lease.state is LeaseState.CLAIMED and lease.holder != holder:
            return Verdict(False, f"lease {lease_id} is claimed by {lease.holder}")
        self._touch(replace(lease, state=LeaseState.CLAIMED, holder=holder), now)
        return Verdict(True)

    def renew(self, lease_ids: list[str], epoch: str, holder: str, now: float) -> list[str]:
        """Extend the leases that `holder` claimed; returns those that are no longer its live leases."""
        gone = []
        for lease_id in lease_ids:
            lease = self._find(lease_id, epoch, now)
            if isinstance(lease, Verdict) or lease.state is not LeaseState.CLAIMED or lease.holder != holder:
                gone.append(lease_id)
            else:
                self._touch(lease, now)
        return gone

    def commit(self, lease_id: str, epoch: str, holder: str, now: float) -> Verdict:
        """Confirm what `holder` read, and release. Succeeds only for a live lease claimed by `holder`."""
        tomb = self._tombstones.get(lease_id)
        if tomb and epoch == self.epoch and tomb.state is LeaseState.COMMITTED and tomb.holder == holder:
            return Verdict(True, "already committed")
        lease = self._find(lease_id, epoch, now)
        if isinstance(lease, Verdict):
            return lease
        if lease.state is not LeaseState.CLAIMED or lease.holder != holder:
            return Verdict(False, f"lease {lease_id} is not claimed by {holder}")
        if not lease.sealed:
            return Verdict(False, f"lease {lease_id} is still being computed")
        return self._end(lease, LeaseState.COMMITTED, now)

    def release(self, lease_id: str, epoch: str, now: float) -> Verdict:
        """Release a lease that will not be read. Idempotent."""
        lease = self._find(lease_id, epoch, now)
        if isinstance(lease, Verdict):
            return Verdict(epoch == self.epoch and lease_id in self._tombstones, lease.reason)
        return self._end(lease, LeaseState.RELEASED, now)

    def revoke(self, lease_id: str, now: float) -> Verdict:
        """Revoke a lease, whoever holds it. A later commit is refused."""
        lease = self._live.get(lease_id)
        if lease is None:
            tomb = self._tombstones.get(lease_id)
            return Verdict(False, f"lease {lease_id} has ended: {tomb.state}" if tomb else f"unknown lease {lease_id}")
        return self._end(lease, LeaseState.REVOKED, now)

    def give_up(self, attempt: str, now: float) -> list[Verdict]:
        """The router gave up this call: end its leases and grant no more for it."""
        self._given_up[attempt] = None
        while len(self._given_up) > _MAX_TOMBSTONES:
            self._given_up.popitem(last=False)
        mine = [lease for lease in self._live.values() if lease.attempt == attempt]
        return [self._end(lease, LeaseState.RELEASED, now) for lease in mine]

    def release_holder(self, holder: str, now: float) -> list[Verdict]:
        """`holder` is dead: end everything that it claimed, or requested as a router, including calls that still
        arrive."""
        self._dead[holder] = now
        self._dead.move_to_end(holder)
        while len(self._dead) > _MAX_TOMBSTONES:
            self._dead.popitem(last=False)
        mine = [lease for lease in self._live.values() if holder in (lease.holder, lease.router)]
        return [self._end(lease, LeaseState.HOLDER_DIED, now) for lease in mine]

    def expire(self, now: float) -> list[Verdict]:
        """End every lease past its deadline."""
        late = [lease for lease in self._live.values() if lease.deadline <= now]
        return [self._end(lease, LeaseState.EXPIRED, now) for lease in late]

    def is_quiet(self, lease: Lease, now: float) -> bool:
        """Whether a live lease has had no sign of life for longer than with any living holder."""
        return now - lease.touched_at > max(1.5, _QUIET_PART * self.lease_s)

    def block_seconds(self, now: float) -> tuple[float, float]:
        """Blocks times seconds so far: (leased, the leaked part of these with a holder that was gone)."""
        live = self._live.values()
        leased = self._leased_block_s + sum(lease.num_blocks * (now - lease.granted_at) for lease in live)
        quiet = [lease for lease in live if self.is_quiet(lease, now)]
        return leased, self._leaked_block_s + sum(lease.num_blocks * (now - lease.touched_at) for lease in quiet)

    def audit(self) -> None:
        """Check that each granted lease is live or was counted as ended once, and that states are consistent."""
        assert len(self._live) + sum(self.ended.values()) == self._granted, "a lease is lost or ended twice"
        assert not self._live.keys() & self._tombstones.keys(), "a lease is both live and ended"
        for lease in self._live.values():
            assert lease.state in LIVE
            assert lease.granted_at <= lease.touched_at < lease.deadline

    def _is_dead(self, holder: str, asked_at: float) -> bool:
        """Whether a call that came at this time is one of the dead's. What comes much later proves that it lives: its
        machine had only stood still. If that is wrong, a lease is left that ends at its deadline."""
        died_at = self._dead.get(holder)
        return died_at is not None and asked_at < died_at + self.lease_s

    def _find(self, lease_id: str, epoch: str, now: float) -> Lease | Verdict:
        """The live lease, or why there is none. A lease past its deadline is dead even before `expire` runs: a process
        that was frozen must not commit an expired lease."""
        if epoch != self.epoch:
            return Verdict(False, f"epoch {epoch} is over; this engine runs epoch {self.epoch}")
        lease = self._live.get(lease_id)
        if lease is None:
            tomb = self._tombstones.get(lease_id)
            return Verdict(False, f"lease {lease_id} has ended: {tomb.state}" if tomb else f"unknown lease {lease_id}")
        if lease.deadline <= now:
            return Verdict(False, f"lease {lease_id} is past its deadline")
        return lease

    def _touch(self, lease: Lease, now: float) -> Lease:
        deadline = max(lease.deadline, now + self.lease_s)
        before = self._live[lease.lease_id]
        if self.is_quiet(before, now):
            # Time that was reported as leaked stays counted: a counter never falls.
            self._leaked_block_s += before.num_blocks * (now - before.touched_at)
        touched = replace(lease, deadline=deadline, touched_at=now)
        self._live[lease.lease_id] = touched
        return touched

    def _end(self, lease: Lease, state: LeaseState, now: float) -> Verdict:
        del self._live[lease.lease_id]
        self._tombstones[lease.lease_id] = replace(lease, state=state)
        self.ended[state] += 1
        self._leased_block_s += lease.num_blocks * (now - lease.granted_at)
        if state in _LEAKING or self.is_quiet(lease, now):
            self._leaked_block_s += lease.num_blocks * (now - lease.touched_at)
        while len(self._tombstones) > _MAX_TOMBSTONES:
            self._tombstones.popitem(last=False)
        # An unsealed lease's blocks belong to a running prefill: only the permission to read them ends.
        return Verdict(True, state.value, freed=lease.request_id if lease.sealed else None, lease_id=lease.lease_id)
