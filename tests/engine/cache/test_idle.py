from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pdctl.engine.cache.idle import Idle

ACTIONS = st.lists(st.tuples(st.sampled_from(["put", "use", "remove", "pop"]), st.integers(0, 9)), max_size=60)


def tenant(key: int) -> str:
    return "abc"[key % 3]


@given(ACTIONS, st.integers(0, 4))
def test_it_gives_up_what_a_plain_list_would(actions: list[tuple[str, int]], quota: int) -> None:
    """Against a list in the order of last use: first the oldest one of a tenant above the quota, else the oldest."""
    idle: Idle[int] = Idle(quota)
    model: list[int] = []
    over: list[str] = []  # tenants above the quota, the one that has been so for longest first

    def count(name: str) -> int:
        return sum(tenant(key) == name for key in model)

    for action, key in actions:
        if action == "put" and key not in model:
            idle.put(key, tenant(key))
            model.append(key)
        elif action == "use" and key in model:
            idle.use(key)
            model.remove(key)
            model.append(key)
        elif action == "remove" and key in model:
            idle.remove(key)
            model.remove(key)
        elif action == "pop" and model:
            expected = next((one for one in model if over and tenant(one) == over[0]), model[0])
            assert idle.pop() == expected
            model.remove(expected)
        over = [name for name in over if count(name) > quota]
        over += [name for name in "abc" if quota and count(name) > quota and name not in over]
        idle.audit()
        assert list(idle.keys()) == model
        assert len(idle) == len(model)
        assert all(one in idle for one in model)


def test_one_tenant_does_not_drive_out_another() -> None:
    idle: Idle[int] = Idle(quota=5)
    for key in range(3):
        idle.put(key, "quiet")
    for key in range(10, 30):
        idle.put(key, "busy")
    given_up = [idle.pop() for _ in range(15)]
    assert given_up == list(range(10, 25)), "its own oldest ones, although others are older"
    assert idle.pop() == 0, "nobody has too much now"
