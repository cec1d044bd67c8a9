from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdctl.engine.handover.lease import Lease, LeaseState, LeaseTable

EPOCH = "b-1"


def granted(
    table: LeaseTable, name: str = "r", blocks: int = 3, holder: str = "proxy", now: float = 0.0, sealed: bool = True
) -> Lease:
    lease = table.grant(name, blocks, holder, now, sealed)
    assert lease is not None
    return lease


def claimed(table: LeaseTable, now: float = 0.0) -> Lease:
    lease = granted(table, now=now)
    assert table.claim(lease.lease_id, EPOCH, "d", now).ok
    return lease


def test_commit_certifies_and_frees_once_and_is_repeatable() -> None:
    table = LeaseTable(EPOCH, 10)
    lease = claimed(table)
    first = table.commit(lease.lease_id, EPOCH, "d", 5)
    again = table.commit(lease.lease_id, EPOCH, "d", 500)
    assert (first.ok, first.freed) == (True, "r")
    assert (again.ok, again.freed) == (True, None)
    table.audit()


def test_commit_after_the_deadline_is_refused_even_before_the_sweep() -> None:
    table = LeaseTable(EPOCH, 10)
    lease = claimed(table)
    verdict = table.commit(lease.lease_id, EPOCH, "d", 10)
    assert not verdict.ok
    assert "deadline" in verdict.reason
    assert [v.freed for v in table.expire(10)] == ["r"]
    assert not table.commit(lease.lease_id, EPOCH, "d", 11).ok


def test_commit_needs_a_claim_by_the_same_holder() -> None:
    table = LeaseTable(EPOCH, 10)
    lease = granted(table)
    assert not table.commit(lease.lease_id, EPOCH, "d", 1).ok
    table.claim(lease.lease_id, EPOCH, "d", 1)
    assert not table.commit(lease.lease_id, EPOCH, "other", 1).ok
    assert table.commit(lease.lease_id, EPOCH, "d", 1).ok
    assert not table.commit(lease.lease_id, EPOCH, "other", 1).ok, "a tombstone answers its own holder only"


def test_a_second_holder_cannot_claim() -> None:
    table = LeaseTable(EPOCH, 10)
    lease = claimed(table)
    assert not table.claim(lease.lease_id, EPOCH, "other", 1).ok
    assert table.claim(lease.lease_id, EPOCH, "d", 1).ok, "the same holder may ask twice"


def test_stale_epochs_and_unknown_leases_are_refused() -> None:
    table = LeaseTable(EPOCH, 10)
    lease = claimed(table)
    for epoch, lease_id in (("b-0", lease.lease_id), (EPOCH, "nonsense")):
        assert not table.claim(lease_id, epoch, "d", 1).ok
        assert not table.commit(lease_id, epoch, "d", 1).ok
        assert not table.release(lease_id, epoch, 1).ok
        assert table.renew([lease_id], epoch, "d", 1) == [lease_id]
    assert table.live(), "nothing of that ended the lease"


def test_renewal_extends_and_never_shortens() -> None:
    table = LeaseTable(EPOCH, 10)
    lease = claimed(table)
    assert table.renew([lease.lease_id], EPOCH, "d", 8) == []
    assert [lease.deadline for lease in table.live()] == [18]
    assert table.renew([lease.lease_id], EPOCH, "d", 5) == []
    assert [lease.deadline for lease in table.live()] == [18]
    assert table.renew([lease.lease_id], EPOCH, "d", 18) == [lease.lease_id], "too late"


def test_release_is_idempotent_and_a_dead_holder_frees_only_its_own() -> None:
    table = LeaseTable(EPOCH, 10)
    a, b = claimed(table), granted(table, "q", 1)
    table.claim(b.lease_id, EPOCH, "e", 0)
    assert [v.freed for v in table.release_holder("d", 1)] == ["r"]
    assert table.release_holder("d", 1) == []
    assert table.release(a.lease_id, EPOCH, 1).ok
    assert table.release(b.lease_id, EPOCH, 1).freed == "q"
    assert table.release(b.lease_id, EPOCH, 1).freed is None
    assert table.ended[LeaseState.HOLDER_DIED] == 1
    table.audit()


def test_the_dead_leave_nothing_whatever_arrives_after_them() -> None:
    """A dead router's leases end whether claimed or not. Its late calls are ignored."""
    table = LeaseTable(EPOCH, 10)
    claimed(table)
    table.grant("waiting", 1, "proxy", 0)
    other = granted(table, "other", 1, "another")
    assert sorted(str(v.freed) for v in table.release_holder("proxy", 1)) == ["r", "waiting"]
    assert table.grant("late", 1, "proxy", 2) is None
    table.release_holder("d", 2)
    refused = table.claim(other.lease_id, EPOCH, "d", 3)
    assert not refused.ok
    assert "dead" in refused.reason
    table.audit()


def test_a_holder_whose_machine_had_only_stood_still_is_heard_again() -> None:
    """Its calls come long after it was said to be dead."""
    table = LeaseTable(EPOCH, 10)
    table.release_holder("d", 1)
    table.release_holder("proxy", 2)
    other = granted(table, "other", 1, "another", 5)
    assert not table.claim(other.lease_id, EPOCH, "d", 10.9).ok
    assert table.claim(other.lease_id, EPOCH, "d", 11).ok
    assert table.grant("asked for before", 1, "proxy", 20, asked_at=11.9) is None, "a long prefill"
    assert table.grant("asked for after", 1, "proxy", 20, asked_at=12) is not None
    table.release_holder("d", 21)
    assert table.ended[LeaseState.HOLDER_DIED] == 1, "its lease ends with it"
    table.audit()


def test_a_call_that_its_router_gave_up_leaves_no_lease_before_or_after() -> None:
    table = LeaseTable(EPOCH, 10)
    table.grant("r", 3, "proxy", 0, attempt="one")
    table.grant("other", 3, "proxy", 0, attempt="two")
    assert [v.freed for v in table.give_up("one", 1)] == ["r"]
    assert table.grant("r", 3, "proxy", 2, attempt="one") is None, "the word overtook the prefill"
    assert table.grant("r", 3, "proxy", 2, attempt="three") is not None
    assert len(table.live()) == 2
    table.audit()


def test_an_unsealed_lease_can_be_read_and_not_committed() -> None:
    table = LeaseTable(EPOCH, 10)
    lease = granted(table, sealed=False)
    assert table.claim(lease.lease_id, EPOCH, "d", 1).ok
    refused = table.commit(lease.lease_id, EPOCH, "d", 2)
    assert not refused.ok
    assert "still being computed" in refused.reason
    sealed = table.seal(lease.lease_id, 5, 3)
    assert sealed is not None
    assert (sealed.holder, sealed.num_blocks, sealed.deadline) == ("d", 5, 13)
    assert table.commit(lease.lease_id, EPOCH, "d", 4).freed == "r"


def test_the_end_of_an_unsealed_lease_frees_nothing_and_it_cannot_be_sealed() -> None:
    """The blocks belong to a prefill that is still running."""
    table = LeaseTable(EPOCH, 10)
    for end in ("revoke", "release", "expire", "holder"):
        lease = granted(table, holder="d", sealed=False)
        if end == "revoke":
            assert table.revoke(lease.lease_id, 1).freed is None
        elif end == "release":
            assert table.release(lease.lease_id, EPOCH, 1).freed is None
        elif end == "holder":
            assert [v.freed for v in table.release_holder("d", 1)] == [None]
        else:
            assert [v.freed for v in table.expire(10)] == [None]
        assert table.seal(lease.lease_id, 3, 2) is None
    table.audit()


def test_a_revoked_lease_is_not_certified() -> None:
    table = LeaseTable(EPOCH, 10)
    lease = claimed(table)
    assert table.revoke(lease.lease_id, 1).freed == "r"
    assert "revoked" in table.commit(lease.lease_id, EPOCH, "d", 1).reason
    assert "has ended" in table.revoke(lease.lease_id, 1).reason
    assert "unknown" in table.revoke("nonsense", 1).reason


def test_block_seconds_count_what_was_leased_and_what_leaked() -> None:
    table = LeaseTable(EPOCH, 10)
    good, dead = claimed(table), claimed(table)  # 3 blocks each
    table.commit(good.lease_id, EPOCH, "d", 2)
    assert table.block_seconds(2) == (3 * 2 + 3 * 2, 0)
    assert not table.is_quiet(dead, 5)
    assert table.block_seconds(8) == (6 + 3 * 8, 3 * 8), "silent for longer than a living holder would be"
    table.expire(10)
    assert table.block_seconds(50) == (6 + 30, 30), "an end stops the clock"


class LeaseMachine(RuleBasedStateMachine):
    """Any order of calls: every lease frees its blocks exactly once, and commits only while live."""

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable(EPOCH, 10)
        self.now = 0.0
        self.leases: list[Lease] = []
        self.freed: list[str] = []
        self.lives = 0
        self.counted = 0.0, 0.0

    def _pick(self, index: int) -> str:
        return self.leases[index % len(self.leases)].lease_id if self.leases else "none"

    def _took(self, freed: str | None) -> None:
        if freed is not None:
            assert freed not in self.freed, "freed twice"
            self.freed.append(freed)

    @rule()
    def grant(self) -> None:
        self.leases.append(granted(self.table, f"r{len(self.leases)}", 1, now=self.now))

    @rule(seconds=st.floats(0, 6))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(index=st.integers(0, 50), holder=st.sampled_from("de"))
    def claim(self, index: int, holder: str) -> None:
        self.table.claim(self._pick(index), EPOCH, f"{holder}{self.lives}", self.now)

    @rule(index=st.integers(0, 50), holder=st.sampled_from("de"))
    def renew(self, index: int, holder: str) -> None:
        self.table.renew([self._pick(index)], EPOCH, f"{holder}{self.lives}", self.now)

    @rule(index=st.integers(0, 50), holder=st.sampled_from("de"))
    def commit(self, index: int, holder: str) -> None:
        lease_id = self._pick(index)
        holder = f"{holder}{self.lives}"
        live = {lease.lease_id: lease for lease in self.table.live()}
        verdict = self.table.commit(lease_id, EPOCH, holder, self.now)
        if verdict.freed:
            assert live[lease_id].holder == holder
            assert live[lease_id].deadline > self.now
        self._took(verdict.freed)

    @rule(index=st.integers(0, 50))
    def release(self, index: int) -> None:
        self._took(self.table.release(self._pick(index), EPOCH, self.now).freed)

    @rule(holder=st.sampled_from("de"))
    def holder_dies(self, holder: str) -> None:
        for verdict in self.table.release_holder(f"{holder}{self.lives}", self.now):
            self._took(verdict.freed)
        self.lives += 1

    @rule(index=st.integers(0, 50))
    def revoke(self, index: int) -> None:
        self._took(self.table.revoke(self._pick(index), self.now).freed)

    @rule()
    def expire(self) -> None:
        for verdict in self.table.expire(self.now):
            self._took(verdict.freed)
        assert all(lease.deadline > self.now for lease in self.table.live())

    @invariant()
    def books_hold(self) -> None:
        self.table.audit()
        leased, leaked = self.table.block_seconds(self.now)
        assert leased >= self.counted[0] - 1e-6, "leased block-seconds fell"
        assert leaked >= self.counted[1] - 1e-6, "leaked block-seconds fell"
        self.counted = leased, leaked
        assert len(self.freed) + len(self.table.live()) == len(self.leases)

    def teardown(self) -> None:
        self.now += 1000
        self.expire()
        assert sorted(self.freed) == sorted(lease.request_id for lease in self.leases), "a lease without an end"


TestLeases = LeaseMachine.TestCase
TestLeases.settings = settings(max_examples=100, stateful_step_count=50)
