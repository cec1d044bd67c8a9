from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdctl.engine.tiers import Rows
from pdctl.engine.tiers.host import HostTier, capacity_of

CAPACITY, SIZE = 6, 8
NUMBERS = st.lists(st.integers(0, 11), min_size=1, max_size=5, unique=True)


def name(number: int) -> bytes:
    return number.to_bytes(32, "big")


def rows(numbers: list[int]) -> Rows:
    return np.array([[number] * SIZE for number in numbers], dtype=np.uint8)


class HostMachine(RuleBasedStateMachine):
    """A tier has what was used last, as much as fits, with the content that it was put with; and tells of it."""

    def __init__(self) -> None:
        super().__init__()
        self.tier = HostTier(CAPACITY, SIZE)
        self.model: list[int] = []  # in the order of last use
        self.told: set[bytes] = set()

    @rule(numbers=NUMBERS)
    def put(self, numbers: list[int]) -> None:
        self.tier.put([name(number) for number in numbers], rows(numbers), [""] * len(numbers))
        for number in reversed(numbers):
            if number in self.model:
                self.model.remove(number)
            self.model.append(number)
            del self.model[: max(0, len(self.model) - CAPACITY)]

    @rule(numbers=NUMBERS)
    def get(self, numbers: list[int]) -> None:
        count = next((at for at, number in enumerate(numbers) if number not in self.model), len(numbers))
        assert self.tier.leading([name(number) for number in numbers]) == count
        assert (self.tier.get([name(number) for number in numbers]) == rows(numbers[:count]).reshape(-1, SIZE)).all()
        for number in reversed(numbers[:count]):
            self.model.remove(number)
            self.model.append(number)

    @rule(numbers=NUMBERS)
    def missing(self, numbers: list[int]) -> None:
        found = self.tier.missing([name(number) for number in numbers])
        assert found == [number not in self.model for number in numbers]
        for number in numbers:
            if number in self.model:
                self.model.remove(number)
                self.model.append(number)

    @rule()
    def changes(self) -> None:
        came, went = self.tier.changes()
        self.told.difference_update(went)
        self.told.update(came)
        assert self.told == {name(number) for number in self.model}

    @invariant()
    def books_hold(self) -> None:
        self.tier.audit()
        assert self.tier.num_blocks == len(self.model)


TestHostTier = HostMachine.TestCase
TestHostTier.settings = settings(max_examples=60, stateful_step_count=40)


def test_who_asks_for_changes_does_not_wait_for_a_copy() -> None:
    """The step loop asks after every step."""
    tier = HostTier(CAPACITY, SIZE)
    tier.put([name(1)], rows([1]), [""])
    with tier._lock:
        assert tier.changes() == ([name(1)], [])
        assert tier.changes() == ([], [])


def test_a_tenant_over_its_quota_gives_up_its_own() -> None:
    tier = HostTier(6, SIZE, quota=3)
    tier.put([name(1), name(2)], rows([1, 2]), ["quiet"] * 2)
    for number in range(10, 20):
        tier.put([name(number)], rows([number]), ["busy"])
    assert tier.missing([name(1), name(2)]) == [False, False]


def test_beginnings_are_kept_longer_than_ends() -> None:
    tier = HostTier(4, SIZE)
    tier.put([name(number) for number in range(4)], rows([0, 1, 2, 3]), [""] * 4)
    tier.put([name(9)], rows([9]), [""])
    assert tier.missing([name(number) for number in range(4)]) == [False, False, False, True]


def test_a_capacity_is_whole_blocks() -> None:
    assert capacity_of(1, 3 << 28) == 1
    assert capacity_of(0.001, 1 << 30) == 0
