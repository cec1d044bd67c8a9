"""A supervisor that does not answer may still be running: removed files, a stopped or killed supervisor."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.service import Run, Service, pid_of, running, single, wait_until

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    with running(module_run, single()) as found:
        yield found


def test_a_removed_socket_comes_back(service: Service) -> None:
    (service.run.folder / "r" / "t" / "control.sock").unlink()
    assert service.status().state == "ready"


def test_a_removed_run_directory_comes_back(service: Service) -> None:
    before = service.process("hybrid-0")
    shutil.rmtree(service.run.folder / "r" / "t")
    again = service.run.cli("up", "-d")
    assert again.returncode == 1
    assert "already running" in again.stderr
    assert service.status().state == "ready"
    assert service.process("hybrid-0").pid == before.pid
    # A process that starts now finds its files.
    service.run.cli("restart", "proxy", check=True)
    service.run.cli("restart", "hybrid-0", check=True)
    service.wait(lambda: service.status().state == "ready", what="ready again")
    service.healthy()
    assert service.complete("x", max_tokens=4)["token_ids"]


def test_a_stopped_supervisor_is_named(service: Service) -> None:
    pid = service.status().supervisor_pid
    os.kill(pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor() as side_by_side:  # each waits ten seconds for an answer
            found = list(side_by_side.map(lambda verb: service.run.cli(*verb), (("status",), ("restart", "hybrid-0"))))
        for said in found:
            assert said.returncode == 1
            assert f"(pid {pid}) was stopped by a signal" in said.stderr
            assert f"kill -CONT {pid}" in said.stderr
    finally:
        os.kill(pid, signal.SIGCONT)
    assert service.status().state == "ready"


def test_why_knows_exits_that_could_not_be_written(service: Service) -> None:
    exits = service.run.folder / "s" / "t" / "logs" / "exits.jsonl"
    exits.unlink(missing_ok=True)
    exits.symlink_to("nowhere/exits.jsonl")  # nothing can be written there, as on a full disk
    before = service.process("hybrid-0")
    os.kill(pid_of(before), signal.SIGKILL)
    service.restarted(before)
    told = service.wait(lambda: (found := service.run.cli("why", "hybrid-0").stdout) and found, what="the exit")
    assert "killed by SIGKILL" in told
    exits.unlink()


@pytest.mark.parametrize("removed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_down_ends_what_does_not_answer(run: Run, removed: bool) -> None:
    run.write(single())
    run.cli("up", "-d", check=True)
    pid = int((run.folder / "r" / "t" / "lock").read_text())
    os.kill(pid, signal.SIGSTOP)
    if removed:
        shutil.rmtree(run.folder / "r" / "t")
    done = run.cli("down", "--now")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "t is down\n"
    assert not run.processes()
    assert not (run.folder / "r" / "t").exists()
    assert "is not running" in run.cli("down").stderr


def test_down_after_a_killed_supervisor_that_took_its_engines_along(run: Run) -> None:
    run.write(single())
    run.cli("up", "-d", check=True)
    os.kill(int((run.folder / "r" / "t" / "lock").read_text()), signal.SIGKILL)
    wait_until(lambda: not run.processes(), what="the end of the engines")
    assert "hint: start it with: pdctl up" in run.cli("status").stderr
    done = run.cli("down")
    assert (done.returncode, done.stdout) == (0, "t is down\n")
    assert not (run.folder / "r" / "t").exists()


def test_relative_directories_mean_the_same_to_every_process(run: Run) -> None:
    run.write(single())
    relative = {
        "PDCTL_RUN": "r",
        "PDCTL_STATE": "s",
        "XDG_RUNTIME_DIR": "x",
        "XDG_STATE_HOME": "y",
        "XDG_CACHE_HOME": "z",
    }
    done = run.cli("up", "-d", extra=relative)
    try:
        assert done.returncode == 0, done.stderr
        assert run.cli("status", check=True).stdout.startswith("service t: ready"), "the same place, written in full"
        assert not [name for name in ("x", "y", "z") if (run.folder / name).exists()], (
            "XDG's rule: not absolute, ignored"
        )
    finally:
        run.cli("down")


def test_a_detached_start_says_why_it_failed(run: Run) -> None:
    run.write(single())
    done = run.cli("up", "-d", extra={"PDCTL_RUN": f"/tmp/{'x' * 100}"})
    assert done.returncode == 1
    assert "is too long for a unix socket" in done.stderr
    assert "hint: set PDCTL_RUN to a shorter path" in done.stderr
