"""The end of an agent on its node, and of what a killed one has left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pdctl.errors import PdctlError
from pdctl.host.processes.presence import supervisor_of
from pdctl.launchers.ending import end_agent
from pdctl.launchers.node import file_of
from pdctl.wire import UNIT_ENV
from tests.launchers.test_keeper import HOLDER
from tests.service import wait_until

# Ends at the second signal, as a supervisor that drains does.
DRAINING = """
import signal
def told(*_):
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
""" + HOLDER.replace("time.sleep", "signal.signal(signal.SIGTERM, told)\ntime.sleep")


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PDCTL_RUN", str(tmp_path / "r"))
    monkeypatch.setenv("PDCTL_STATE", str(tmp_path / "s"))
    folder = tmp_path / "r" / "x"
    folder.mkdir(parents=True)
    file_of("x").parent.mkdir(parents=True)
    file_of("x").write_text("")
    return folder


def start(run_dir: Path, program: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", program, str(run_dir)])
    wait_until(lambda: supervisor_of(run_dir) == process.pid, what="its lock")
    return process


def test_an_agent_ends_and_leaves_nothing(run_dir: Path) -> None:
    process = start(run_dir, HOLDER)
    assert end_agent("x", now=False)
    assert process.wait() == -signal.SIGTERM
    assert not run_dir.exists()
    assert not file_of("x").exists()
    assert not end_agent("x", now=False)


def test_now_does_not_wait_for_streams(run_dir: Path) -> None:
    process = start(run_dir, DRAINING)
    assert end_agent("x", now=True)
    assert process.wait() == 0


def test_what_ignores_signals_is_killed(run_dir: Path) -> None:
    deaf = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{HOLDER}"
    process = start(run_dir, deaf)
    os.kill(process.pid, signal.SIGSTOP)
    assert end_agent("x", now=True)
    assert process.wait() == -signal.SIGKILL


def test_engines_of_a_killed_agent_end_too(run_dir: Path) -> None:
    env = {**os.environ, UNIT_ENV: f"{run_dir}:prefill"}
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=env, start_new_session=True)
    wait_until(lambda: UNIT_ENV.encode() in Path(f"/proc/{left.pid}/environ").read_bytes(), what="its stamp")
    assert end_agent("x", now=False)
    assert left.wait() in (-signal.SIGTERM, -signal.SIGKILL)


@pytest.mark.parametrize("service", ["", ".", "..", "../r/x", "x/", "/tmp"])
def test_what_is_no_service_ends_nothing(run_dir: Path, service: str) -> None:
    """A script whose variable is empty must not remove the folders of all services."""
    with pytest.raises(PdctlError, match="is not a service's name"):
        end_agent(service, now=True)
    assert run_dir.exists()
    assert file_of("x").exists()
