from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pdctl.engine.cache.blocks import BlockAllocator


class AllocatorMachine(RuleBasedStateMachine):
    """The counts are consistent after any order of allocations, names, shares and frees, and a name leads to the
    content that it was given for."""

    @initialize(size=st.integers(1, 60), quota=st.integers(0, 5))
    def begin(self, size: int, quota: int) -> None:
        self.model: dict[str, list[int]] = {}
        self.quarantined: dict[str, list[int]] = {}
        self.freed: list[int] = []
        # The content of each block; None: overwritten.
        self.content: dict[int, bytes | None] = {}
        self.idle: list[int] = []
        self.lives: dict[int, tuple[bytes, int]] = {}
        self.allocator = BlockAllocator(size, self.freed.extend, quota=quota)
        self.allocator.on_idle = self.idle.extend

    @rule(owner=st.sampled_from("abcdef"), count=st.integers(0, 20))
    def allocate(self, owner: str, count: int) -> None:
        free = self.allocator.num_free
        taken = self.allocator.allocate(owner, count)
        assert (taken is None) == (count > free)
        if taken is not None:
            assert len(taken) == count
            self.model.setdefault(owner, []).extend(taken)
            self.content |= dict.fromkeys(taken)

    @rule(owner=st.sampled_from("abcdef"), letters=st.text("xy", min_size=1, max_size=3))
    def name(self, owner: str, letters: str) -> None:
        for block in self.model.get(owner, [])[:1]:
            if self.content[block] is None:
                self.content[block] = letters.encode()
            self.allocator.name(block, self.content[block] or b"", owner)

    @rule(owner=st.sampled_from("abcdef"), letters=st.lists(st.text("xy", min_size=1, max_size=3), max_size=4))
    def share(self, owner: str, letters: list[str]) -> None:
        names = [word.encode() for word in dict.fromkeys(letters)]
        found = [block for block in self.allocator.find(names) if block not in self.model.get(owner, [])]
        assert all(self.content[block] in names for block in found), "the content is not what the name says"
        self.allocator.share(owner, found)
        self.model.setdefault(owner, []).extend(found)

    @rule(owner=st.sampled_from("abcdef"), count=st.integers(0, 10))
    def shrink(self, owner: str, count: int) -> None:
        """Only blocks that are nobody else's, and that nobody can find, are given back."""
        mine, named = self.model.get(owner, []), self.allocator._name_of
        kept = max([count, *(at + 1 for at, block in enumerate(mine) if block in named)])
        if mine and kept < len(mine):
            self.freed.clear()
            self.allocator.shrink(owner, kept)
            assert self.freed == mine[kept:]
            self.model[owner] = mine[:kept]

    @rule(owner=st.sampled_from("abcdef"))
    def free(self, owner: str) -> None:
        self.freed.clear()
        self.idle.clear()
        blocks = self.model.pop(owner, [])
        assert self.allocator.free(owner) == len(blocks)
        others = {block for held in self.model.values() for block in held}
        kept = set(self.allocator._name_of)
        assert self.freed == [block for block in blocks if block not in others | kept], "every free block is told of"
        assert self.idle == [block for block in blocks if block in kept - others], "and every idle one"

    @rule(owner=st.sampled_from("abcdef"))
    def quarantine(self, owner: str) -> None:
        if owner not in self.quarantined:
            named = set(self.allocator._name_of)
            self.allocator.quarantine(owner)
            self.quarantined[owner] = [block for block in self.model.pop(owner, []) if block not in named]

    @rule(owner=st.sampled_from("abcdef"))
    def settle(self, owner: str) -> None:
        assert self.allocator.settle(owner) == len(self.quarantined.pop(owner, []))

    @invariant()
    def books_hold(self) -> None:
        if hasattr(self, "allocator"):
            self.allocator.audit()
            for block, (name, life) in self.lives.items():
                if self.allocator.life(block) == life:
                    assert self.allocator.named(block)[0] == name, "another content in the same life"
            self.lives = {block: (name, self.allocator.life(block)) for block, name in self.allocator._name_of.items()}
            assert all(self.allocator.owned(owner) == blocks for owner, blocks in self.model.items())
            assert self.allocator.num_quarantined == sum(map(len, self.quarantined.values()))
            held = {block for blocks in (*self.model.values(), *self.quarantined.values()) for block in blocks}
            assert self.allocator.num_free + len(held) == self.allocator.num_blocks


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


def test_what_was_used_last_is_given_up_last_and_ends_before_beginnings() -> None:
    allocator = BlockAllocator(4)
    for owner in "ab":
        for index, block in enumerate(allocator.allocate(owner, 2) or ()):
            allocator.name(block, f"{owner}{index}".encode())
        allocator.free(owner)
    assert (allocator.num_free, allocator.num_idle) == (4, 4)
    kept = []
    for _ in range(4):
        allocator.allocate("new", 1)
        kept.append([name for name in (b"a0", b"a1", b"b0", b"b1") if allocator.find([name])])
    assert kept == [[b"a0", b"b0", b"b1"], [b"b0", b"b1"], [b"b0"], []]


def test_idle_blocks_make_room_for_a_run() -> None:
    allocator = BlockAllocator(40)
    for number in range(5):
        for block in allocator.allocate(str(number), 8) or ():
            allocator.name(block, str(block).encode())
        allocator.free(str(number))
    taken = allocator.allocate("new", 8)
    assert taken is not None
    assert taken == list(range(taken[0], taken[0] + 8)), "attention would have to gather"
