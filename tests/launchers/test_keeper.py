"""One process kept alive: started or adopted, found by its lock, started again, left alone."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdctl.host.processes.presence import supervisor_of
from pdctl.launchers.daemon import Daemon, start_daemon
from pdctl.launchers.keeper import Keeper, Kept, Pauses
from pdctl.launchers.launcher import RUNNING, WAITING, Standing
from tests.service import wait_until

# Holds the lock of a run directory, as a supervisor does.
HOLDER = """
import fcntl, os, sys, time
lock = os.open(sys.argv[1] + "/lock", os.O_RDWR | os.O_CREAT)
fcntl.flock(lock, fcntl.LOCK_EX)
os.ftruncate(lock, 0)
os.pwrite(lock, str(os.getpid()).encode(), 0)
time.sleep(600)
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "run"
    folder.mkdir()
    yield folder
    if (pid := supervisor_of(folder)) is not None:
        os.kill(pid, signal.SIGKILL)


def kept(run_dir: Path, program: str = HOLDER) -> Kept:
    def start() -> Daemon:
        argv = [sys.executable, "-c", program, str(run_dir)]
        return start_daemon(argv, os.environ, run_dir / "log", "pdctl.test")

    return Kept("a", lambda: supervisor_of(run_dir), start, lambda: (run_dir / "log").read_text().strip())


@pytest.fixture
def keep(run_dir: Path) -> Iterator[Callable[..., Keeper]]:
    """Makes keepers that are released at the end."""
    made: list[Keeper] = []

    def begin(program: str = HOLDER) -> Keeper:
        keeper = Keeper(kept(run_dir, program))
        keeper.begin()
        made.append(keeper)
        return keeper

    yield begin
    for keeper in made:
        keeper.release(10)


def until(keeper: Keeper, state: str, other_than: int = -1) -> Standing:
    def is_so() -> bool:
        return keeper.standing.state == state and keeper.standing.pid != other_than

    wait_until(is_so, what=f"{state}, now {keeper.standing}")
    return keeper.standing


def test_a_process_is_started_and_started_again_when_it_ends(run_dir: Path, keep: Callable[..., Keeper]) -> None:
    keeper = keep()
    first = until(keeper, RUNNING)
    assert (first.pid, first.is_adopted) == (supervisor_of(run_dir), False)
    os.kill(first.pid, signal.SIGKILL)
    again = until(keeper, RUNNING, other_than=first.pid)
    assert (again.pid, again.is_adopted) == (supervisor_of(run_dir), False)


def test_a_keeper_that_comes_later_adopts(run_dir: Path, keep: Callable[..., Keeper]) -> None:
    before = keep()
    pid = until(before, RUNNING).pid
    assert before.release(10)
    assert supervisor_of(run_dir) == pid
    after = until(keep(), RUNNING)
    assert (after.pid, after.is_adopted) == (pid, True)


def test_what_is_released_is_not_started_again(run_dir: Path, keep: Callable[..., Keeper]) -> None:
    keeper = keep()
    pid = until(keeper, RUNNING).pid
    assert keeper.release(10)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: supervisor_of(run_dir) is None, what="its end")
    assert keeper.standing.pid == pid


def test_two_keepers_have_one_process(run_dir: Path, keep: Callable[..., Keeper]) -> None:
    keepers = [keep(), keep()]
    found = [until(keeper, RUNNING) for keeper in keepers]
    assert found[0].pid == found[1].pid == supervisor_of(run_dir)
    os.kill(found[0].pid, signal.SIGKILL)
    again = {until(keeper, RUNNING, other_than=found[0].pid).pid for keeper in keepers}
    assert again == {supervisor_of(run_dir)}


def test_why_it_does_not_run_is_told(keep: Callable[..., Keeper]) -> None:
    keeper = keep("raise SystemExit('cluster.secret_file: no such file')")
    assert until(keeper, WAITING).reason == "cluster.secret_file: no such file"


def test_pauses_grow_to_a_limit_and_begin_anew_after_a_long_life() -> None:
    pauses = Pauses()
    assert [pauses.after(1, 0.5) for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert pauses.after(60, 0.5) == 0.5
    assert pauses.after(1, 0.0) == 0.75
    assert pauses.after(1, 1.0) == 2.5
    for _ in range(10_000):
        assert pauses.after(0, 1.0) <= 37.5
