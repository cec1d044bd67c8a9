from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdctl.engine.lease import Lease, LeaseState, LeaseTable

EPOCH = "b-1"


def claimed(table: LeaseTable, now: float = 0.0) -> Lease:
    lease = table.grant("r", 3, now)
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
    lease = table.grant("r", 3, 0)
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
    assert table.next_deadline() == 18
    assert table.renew([lease.lease_id], EPOCH, "d", 5) == []
    assert table.next_deadline() == 18
    assert table.renew([lease.lease_id], EPOCH, "d", 18) == [lease.lease_id], "too late"


def test_release_is_idempotent_and_a_dead_holder_frees_only_its_own() -> None:
    table = LeaseTable(EPOCH, 10)
    a, b = claimed(table), table.grant("q", 1, 0)
    table.claim(b.lease_id, EPOCH, "e", 0)
    assert [v.freed for v in table.release_holder("d")] == ["r"]
    assert table.release_holder("d") == []
    assert table.release(a.lease_id, EPOCH, 1).ok
    assert table.release(b.lease_id, EPOCH, 1).freed == "q"
    assert table.release(b.lease_id, EPOCH, 1).freed is None
    assert table.ended[LeaseState.HOLDER_DIED] == 1
    table.audit()


class LeaseMachine(RuleBasedStateMachine):
    """Any order of calls: every lease frees its blocks exactly once, and commits only while live."""

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable(EPOCH, 10)
        self.now = 0.0
        self.leases: list[Lease] = []
        self.freed: list[str] = []

    def _pick(self, index: int) -> str:
        return self.leases[index % len(self.leases)].lease_id if self.leases else "none"

    def _took(self, freed: str | None) -> None:
        if freed is not None:
            assert freed not in self.freed, "freed twice"
            self.freed.append(freed)

    @rule()
    def grant(self) -> None:
        self.leases.append(self.table.grant(f"r{len(self.leases)}", 1, self.now))

    @rule(seconds=st.floats(0, 6))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(index=st.integers(0, 50), holder=st.sampled_from("de"))
    def claim(self, index: int, holder: str) -> None:
        self.table.claim(self._pick(index), EPOCH, holder, self.now)

    @rule(index=st.integers(0, 50), holder=st.sampled_from("de"))
    def renew(self, index: int, holder: str) -> None:
        self.table.renew([self._pick(index)], EPOCH, holder, self.now)

    @rule(index=st.integers(0, 50), holder=st.sampled_from("de"))
    def commit(self, index: int, holder: str) -> None:
        lease_id = self._pick(index)
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
        for verdict in self.table.release_holder(holder):
            self._took(verdict.freed)

    @rule()
    def expire(self) -> None:
        for verdict in self.table.expire(self.now):
            self._took(verdict.freed)
        assert all(lease.deadline > self.now for lease in self.table.live())

    @invariant()
    def books_hold(self) -> None:
        self.table.audit()
        assert len(self.freed) + len(self.table.live()) == len(self.leases)

    def teardown(self) -> None:
        self.now += 1000
        self.expire()
        assert sorted(self.freed) == sorted(lease.request_id for lease in self.leases), "a lease without an end"


TestLeases = LeaseMachine.TestCase
TestLeases.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
