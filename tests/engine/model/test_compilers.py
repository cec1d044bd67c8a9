"""Real compiler processes, with a compiler that is as slow as a test wants."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pdctl.engine.model.compilers import Compilers

LONG_S = 60
# Returns its input; "hang NAME" creates a file of that name and never answers.
SCRIPT = """
import os, sys, time
from pathlib import Path
from pdctl.engine.model.compilers import BadGrammar, serve
def compile_one(grammar):
    verb, _, rest = grammar.partition(" ")
    if verb == "hang":
        Path(rest).touch()
        time.sleep(600)
    if verb == "bad":
        raise BadGrammar("it is nonsense")
    if verb == "crash":
        os.abort()
    print("a library that talks", flush=True)
    return grammar.encode() * (1 + 100_000 * (verb == "large"))
serve(compile_one)
"""
Outcome = tuple[bytes, str]


class Asking:
    """Requests and their results, in the order in which they end."""

    def __init__(self, compilers: Compilers) -> None:
        self.compilers = compilers
        self.ends: queue.Queue[tuple[str, bytes, str]] = queue.Queue()

    def ask(self, grammar: str, tenant: str = "", is_wanted: Callable[[], bool] = lambda: True) -> None:
        self.compilers.submit(grammar, tenant, is_wanted, lambda data, reason: self.ends.put((grammar, data, reason)))

    def end(self) -> tuple[str, bytes, str]:
        return self.ends.get(timeout=LONG_S)


def made(deadline_s: float) -> Iterator[Asking]:
    compilers = Compilers([sys.executable, "-c", SCRIPT], deadline_s=deadline_s)
    yield Asking(compilers)
    compilers.audit()
    compilers.close()
    for process in psutil.Process().children():
        process.wait(LONG_S)


@pytest.fixture
def asking() -> Iterator[Asking]:
    yield from made(LONG_S)


@pytest.fixture
def hasty() -> Iterator[Asking]:
    yield from made(0.3)


def until_exists(path: Path) -> None:
    for _ in range(6000):
        if path.exists():
            return
        threading.Event().wait(0.01)
    pytest.fail(f"{path} was not made")


def test_outcomes(asking: Asking) -> None:
    asking.ask("a")
    asking.ask("bad")
    asking.ask("large")
    found = {asking.end() for _ in range(3)}
    assert found == {
        ("a", b"a", ""),
        ("bad", b"", "the grammar cannot be compiled: it is nonsense"),
        ("large", b"large" * 100_001, ""),
    }


def test_a_hard_one_delays_its_tenant_alone(asking: Asking, tmp_path: Path) -> None:
    wanted = threading.Event()
    wanted.set()
    asking.ask(f"hang {tmp_path / 'begun'}", "mallory", wanted.is_set)
    until_exists(tmp_path / "begun")
    asking.ask("mine", "mallory")
    asking.ask("a", "alice")
    asking.ask("b", "bob")
    assert {asking.end()[0], asking.end()[0]} == {"a", "b"}
    assert asking.ends.empty(), "one compilation of a tenant at a time"
    wanted.clear()
    assert asking.end() == ("mine", b"mine", "")


def test_turns_go_from_tenant_to_tenant(asking: Asking, tmp_path: Path) -> None:
    """With one process busy all the time, so that requests end in the order of their turns."""
    forever, wanted = threading.Event(), threading.Event()
    forever.set()
    wanted.set()
    for name, flag in (("one", forever), ("two", wanted)):
        asking.ask(f"hang {tmp_path / name}", name, flag.is_set)
        until_exists(tmp_path / name)
    for number in range(5):
        asking.ask(f"flood {number}", "mallory")
    asking.ask("single", "alice")
    wanted.clear()
    assert [asking.end()[0] for _ in range(6)] == ["flood 0", "single", *(f"flood {n}" for n in range(1, 5))]
    forever.clear()


def test_what_nobody_wants_any_more_ends_with_its_process(asking: Asking, tmp_path: Path) -> None:
    wanted = threading.Event()
    wanted.set()
    asking.ask(f"hang {tmp_path / 'begun'}", "a", wanted.is_set)
    until_exists(tmp_path / "begun")
    [process] = psutil.Process().children()
    wanted.clear()
    process.wait(LONG_S)
    asking.ask("next", "a")
    assert asking.end() == ("next", b"next", "")


def test_what_takes_too_long_is_ended_and_refused_from_then_on(hasty: Asking, tmp_path: Path) -> None:
    hard = f"hang {tmp_path / 'begun'}"
    hasty.ask(hard)
    assert hasty.end() == (hard, b"", "the grammar cannot be compiled: it takes more than 0.3 s")
    (tmp_path / "begun").unlink()
    hasty.ask(hard)
    assert "more than 0.3 s" in hasty.end()[2]
    assert not (tmp_path / "begun").exists(), "it was begun again"


def test_a_process_that_ends_is_replaced(asking: Asking) -> None:
    asking.ask("crash")
    assert asking.end()[2] == "the grammar cannot be compiled: the compiling process ended over it"
    asking.ask("a")
    assert asking.end() == ("a", b"a", "")
    [process] = psutil.Process().children()
    os.kill(process.pid, signal.SIGKILL)
    process.wait(LONG_S)
    asking.ask("b")
    assert asking.end() == ("b", b"b", "")


def test_queues_have_bounds(asking: Asking, tmp_path: Path) -> None:
    wanted = threading.Event()
    wanted.set()
    asking.ask(f"hang {tmp_path / 'begun'}", "a", wanted.is_set)
    until_exists(tmp_path / "begun")
    for number in range(33):
        asking.ask(str(number), "a", wanted.is_set)
    assert asking.end() == ("32", b"", "the grammar cannot be compiled: too many grammars are being compiled")
    wanted.clear()
