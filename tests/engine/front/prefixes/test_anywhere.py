from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pdctl.engine.front.prefixes.anywhere import Anywhere
from pdctl.engine.ipc.messages import KvRemoved, KvStored

CHANGES = st.lists(st.tuples(st.booleans(), st.booleans(), st.lists(st.integers(1, 6), max_size=3)), max_size=40)


def names(numbers: list[int]) -> list[bytes]:
    return [number.to_bytes(8, "big") + bytes(24) for number in numbers]


@given(CHANGES)
def test_who_follows_the_changes_knows_what_is_in_either_memory(changes: list[tuple[bool, bool, list[int]]]) -> None:
    anywhere, pool, beside, told = Anywhere(), set[int](), set[int](), set[int]()
    for in_pool, is_stored, numbers in changes:
        if in_pool:
            change = KvStored(names(numbers), None, []) if is_stored else KvRemoved(names(numbers))
            found = anywhere.pool_changed([change])
        else:
            found = anywhere.beside_changed(*((names(numbers), []) if is_stored else ([], names(numbers))))
        memory = pool if in_pool else beside
        (memory.update if is_stored else memory.difference_update)(numbers)
        for name, came in found:
            assert (name in told) != came, "nothing is told twice"
            (told.add if came else told.discard)(name)
        assert told == pool | beside
        assert all(anywhere.has(name) == (name in told) for name in range(1, 7))
