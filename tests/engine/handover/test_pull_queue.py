from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pdctl.engine.handover.pull_queue import PullQueue


@given(st.lists(st.tuples(st.sampled_from(["push", "take", "done", "drop"]), st.sampled_from("abc")), max_size=80))
def test_any_order_keeps_peers_apart_and_bounds_what_runs(events: list[tuple[str, str]]) -> None:
    queue: PullQueue[int] = PullQueue(per_peer=2, extra=3)
    waiting: dict[str, list[int]] = {peer: [] for peer in "abc"}
    active = dict.fromkeys("abc", 0)
    for number, (event, peer) in enumerate(events):
        if event == "push":
            queue.push(peer, number)
            waiting[peer].append(number)
        elif event == "done" and active[peer]:
            queue.done(peer)
            active[peer] -= 1
        elif event == "drop":
            target = waiting[peer][-1] if waiting[peer] else -1
            assert queue.drop(target.__eq__) == (target in waiting[peer])
            waiting[peer] = [item for item in waiting[peer] if item != target]
        elif event == "take":
            taken = queue.take()
            idle = [p for p in "abc" if waiting[p] and not active[p]]
            if taken is None:
                assert not idle, "a peer that waits for nobody else was made to wait"
                continue
            owner, item = taken
            assert item == waiting[owner].pop(0), "a peer's pulls keep their order"
            active[owner] += 1
            assert active[owner] <= 2
            assert active[owner] == 1 or sum(active.values()) <= 3
        assert len(queue) == sum(map(len, waiting.values()))


def test_peers_take_turns() -> None:
    queue: PullQueue[str] = PullQueue()
    for item in ("a1", "a2", "a3", "b1", "c1"):
        queue.push(item[0], item)
    assert [queue.take()[1] for _ in range(3)] == ["a1", "b1", "c1"]  # type: ignore[index]


def test_a_stuck_peer_leaves_room_for_every_other() -> None:
    queue: PullQueue[str] = PullQueue(per_peer=2, extra=2)
    for _ in range(4):
        queue.push("stuck", "s")
    assert queue.take() is not None
    assert queue.take() is not None
    assert queue.take() is None, "two of its own are enough"
    queue.push("well", "w")
    assert queue.take() == ("well", "w")
