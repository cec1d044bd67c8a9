"""Any order of writes, leases and time: the books stay right, and a mirror that hears of everything is a copy."""

from __future__ import annotations

from contextlib import suppress

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdctl.registry import Change, Created, Delete, LeaseGone, Modified, Put
from pdctl.registry.mirror import Mirror
from pdctl.registry.store import Store

KEYS = st.sampled_from(["/a/1", "/a/2", "/a/3", "/b/1"])
LEASES = st.integers(0, 4)


class Books(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.store, self.now = Store(history=1000), 0.0
        self.model: dict[str, tuple[bytes, int]] = {}
        self.ends: dict[int, float] = {}
        self.late: list[tuple[Change, ...]] = []
        self.mirror = Mirror()

    @rule()
    def grant(self) -> None:
        self.ends[self.store.grant(5, self.now)] = self.now + 5

    @rule(lease=LEASES)
    def keep(self, lease: int) -> None:
        alive = lease in self.ends
        try:
            self.store.keep(lease, self.now)
            assert alive
            self.ends[lease] = self.now + 5
        except LeaseGone:
            assert not alive

    @rule(lease=LEASES)
    def revoke(self, lease: int) -> None:
        self.store.revoke(lease)
        self._end(lease)

    @rule(seconds=st.floats(0, 4))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.store.expire(self.now)
        for lease in [lease for lease, ends_at in self.ends.items() if ends_at <= self.now]:
            self._end(lease)

    @rule(key=KEYS, value=st.binary(max_size=2), lease=LEASES)
    def put(self, key: str, value: bytes, lease: int) -> None:
        with suppress(LeaseGone):
            assert self.store.write([Put(key, value, lease)], []) is not None
            assert lease == 0 or lease in self.ends
            self.model[key] = (value, lease)

    @rule(key=KEYS, other=KEYS, stale=st.booleans(), created=st.booleans())
    def move(self, key: str, other: str, stale: bool, created: bool) -> None:
        """Delete one key and write another, if the first is as it was seen."""
        entry = {e.key: e for e in self.store.listing("/").entries}.get(key)
        if entry is None or key == other:
            return
        condition = Created(key, entry.created - stale) if created else Modified(key, entry.modified - stale)
        done = self.store.write([Delete(key), Put(other, b"moved")], [condition])
        assert (done is None) == stale
        if done is not None:
            del self.model[key]
            self.model[other] = (b"moved", 0)

    @rule(count=st.integers(0, 3))
    def hear(self, count: int) -> None:
        """The mirror hears the next changes, and what it has heard before once more."""
        groups = self.store.changes("/a/", self.mirror.revision)[:count]
        for group in groups + self.late:
            self.mirror.take(group)
        self.late = groups

    @rule()
    def list_again(self) -> None:
        self.mirror.replace(self.store.listing("/a/"))
        for group in self.late:
            assert self.mirror.take(group) == ()

    @invariant()
    def books_are_right(self) -> None:
        self.store.audit()
        assert {e.key: (e.value, e.lease) for e in self.store.listing("/").entries} == self.model

    def teardown(self) -> None:
        for group in self.store.changes("/a/", self.mirror.revision):
            self.mirror.take(group)
        assert self.mirror.entries == {e.key: e for e in self.store.listing("/a/").entries}

    def _end(self, lease: int) -> None:
        if self.ends.pop(lease, None) is not None:
            self.model = {key: held for key, held in self.model.items() if held[1] != lease}


TestBooks = Books.TestCase
