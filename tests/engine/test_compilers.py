from __future__ import annotations

import queue
import threading

import pytest

from pdctl.engine.compilers import BadGrammar, Compilers

LONG_S = 30


class Slow:
    """Work that goes on until it is let go."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.let_go = threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        assert self.let_go.wait(LONG_S)


def always() -> bool:
    return True


def failing() -> None:
    raise BadGrammar("it is nonsense")


def test_outcomes_come_in_order() -> None:
    said: queue.Queue[str] = queue.Queue()
    compilers = Compilers()
    compilers.submit(lambda: None, "a", always, said.put)
    compilers.submit(failing, "b", always, said.put)
    assert [said.get(timeout=LONG_S) for _ in range(2)] == ["", "the grammar cannot be compiled: it is nonsense"]


def test_what_nobody_wants_any_more_is_not_done() -> None:
    done: list[str] = []
    said: queue.Queue[str] = queue.Queue()
    compilers, slow = Compilers(), Slow()
    compilers.submit(slow, "slow", always, said.put)
    assert slow.begun.wait(LONG_S)
    compilers.submit(lambda: done.append("left"), "left", lambda: False, said.put)
    compilers.submit(lambda: done.append("stays"), "stays", always, said.put)
    slow.let_go.set()
    assert [said.get(timeout=LONG_S) for _ in range(2)] == ["", ""]
    assert done == ["stays"]


def test_a_stuck_one_is_left_behind_and_refused_from_then_on() -> None:
    said: queue.Queue[str] = queue.Queue()
    compilers, slow = Compilers(deadline_s=0.02), Slow()
    compilers.submit(slow, "slow", always, said.put)
    assert "more than 0.02 s" in said.get(timeout=LONG_S)
    compilers.submit(lambda: None, "other", always, said.put)
    assert said.get(timeout=LONG_S) == ""
    compilers.submit(lambda: pytest.fail("done again"), "slow", always, said.put)
    assert "more than 0.02 s" in said.get(timeout=LONG_S)
    slow.let_go.set()


def test_too_many_stuck_ones_refuse_the_rest_until_one_ends() -> None:
    said: queue.Queue[str] = queue.Queue()
    compilers = Compilers(deadline_s=0.02)
    stuck = [Slow() for _ in range(3)]
    for number, slow in enumerate(stuck):
        compilers.submit(slow, str(number), always, said.put)
        assert "more than" in said.get(timeout=LONG_S)
    compilers.submit(lambda: None, "next", always, said.put)
    assert "too many" in said.get(timeout=LONG_S)
    for slow in stuck:
        slow.let_go.set()
    for _ in range(1000):
        compilers.submit(lambda: None, "after", always, said.put)
        if said.get(timeout=LONG_S) == "":
            return
        threading.Event().wait(0.01)
    pytest.fail("nothing is compiled after the stuck ones ended")


def test_any_other_failure_is_told_and_the_thread_goes_on() -> None:
    said: queue.Queue[str] = queue.Queue()
    compilers = Compilers()
    for _ in range(5):
        compilers.submit(lambda: {}["missing"], "k", always, said.put)
        assert "KeyError: 'missing'" in said.get(timeout=LONG_S)
    compilers.submit(lambda: None, "fine", always, said.put)
    assert said.get(timeout=LONG_S) == ""
