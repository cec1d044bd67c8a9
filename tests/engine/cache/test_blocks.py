from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pdctl.engine.cache.blocks import BlockAllocator


class AllocatorMachine(RuleBasedStateMachine):
    """The counts are consistent after any order of allocations and frees."""

    @initialize(size=st.integers(1, 60))
    def begin(self, size: int) -> None:
        self.model: dict[str, list[int]] = {}
        self.quarantined: dict[str, list[int]] = {}
        self.freed: list[int] = []
        self.allocator = BlockAllocator(size, self.freed.extend)

    @rule(owner=st.sampled_from("abcdef"), count=st.integers(0, 20))
    def allocate(self, owner: str, count: int) -> None:
        free = self.allocator.num_free
        taken = self.allocator.allocate(owner, count)
        assert (taken is None) == (count > free)
        if taken is not None:
            assert len(taken) == count
            self.model.setdefault(owner, []).extend(taken)

    @rule(owner=st.sampled_from("abcdef"))
    def free(self, owner: str) -> None:
        self.freed.clear()
        blocks = self.model.pop(owner, [])
        assert self.allocator.free(owner) == len(blocks)
        assert self.freed == blocks, "every block that comes free is told of"

    @rule(owner=st.sampled_from("abcdef"))
    def quarantine(self, owner: str) -> None:
        if owner not in self.quarantined:
            self.allocator.quarantine(owner)
            self.quarantined[owner] = self.model.pop(owner, [])

    @rule(owner=st.sampled_from("abcdef"))
    def settle(self, owner: str) -> None:
        assert self.allocator.settle(owner) == len(self.quarantined.pop(owner, []))

    @invariant()
    def books_hold(self) -> None:
        if hasattr(self, "allocator"):
            self.allocator.audit()
            assert all(self.allocator.owned(owner) == blocks for owner, blocks in self.model.items())
            assert self.allocator.num_quarantined == sum(map(len, self.quarantined.values()))
            held = sum(map(len, (*self.model.values(), *self.quarantined.values())))
            assert self.allocator.num_free + held == self.allocator.num_blocks


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=40)


@given(st.integers(1, 40))
def test_a_fresh_pool_gives_one_run(count: int) -> None:
    taken = BlockAllocator(100).allocate("a", count)
    assert taken is not None
    assert taken == list(range(taken[0], taken[0] + count))


def test_growth_goes_on_where_the_owner_ended() -> None:
    allocator = BlockAllocator(64)
    first = allocator.allocate("a", 4)
    allocator.allocate("b", 4)
    assert first is not None
    grown = allocator.allocate("a", 2)
    assert grown == [first[-1] + 1, first[-1] + 2], "room is left behind a new owner"


def test_scattered_blocks_are_used_when_no_run_is_left() -> None:
    allocator = BlockAllocator(6)
    for owner in "abcdef":
        allocator.allocate(owner, 1)
    for owner in "ace":
        allocator.free(owner)
    taken = allocator.allocate("x", 3)
    assert taken is not None
    assert len(taken) == 3
    allocator.audit()
