"""A process that belongs to nobody, and nothing of Ray is in it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pdctl.errors import PdctlError
from pdctl.launchers.daemon import start_daemon
from tests.service import wait_until

REPORT = """
import json, os, signal, sys, time
from pathlib import Path
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
Path(sys.argv[1] + ".new").write_text(json.dumps({
    "parent": os.getppid(), "session": os.getsid(0), "blocked": int(status["SigBlk"], 16),
    "ignored": int(status["SigIgn"], 16), "oom": int(Path("/proc/self/oom_score_adj").read_text()),
    "files": sorted(os.listdir("/proc/self/fd")), "folder": os.getcwd(), "env": dict(os.environ),
}))
os.rename(sys.argv[1] + ".new", sys.argv[1])
print("some words", flush=True)
time.sleep(600)
"""
# As an actor of Ray is: SIGINT blocked, signals ignored, files open, the kernel's first victim; it adopts what is left.
HOST = """
import ctypes, os, signal, sys
from pathlib import Path
from pdctl.launchers.daemon import start_daemon
if sys.argv[4] == "adopts":
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
signal.signal(signal.SIGHUP, signal.SIG_IGN)
Path("/proc/self/oom_score_adj").write_text("1000")
os.set_inheritable(os.open("/dev/null", os.O_RDONLY), True)
argv = [sys.executable, "-c", sys.argv[1], sys.argv[2]]
started = start_daemon(argv, {"A": "1"}, Path(sys.argv[3]), "pdctl.test", [os.getpid()])
print(started.pid, os.getpid(), *started.notes, sep="\\n")
"""


def hosted(tmp_path: Path, adopts: str = "") -> tuple[int, int, list[str]]:
    """The daemon, the process that started it, and the notes."""
    report, log = tmp_path / "report", tmp_path / "new" / "log"
    argv = [sys.executable, "-c", HOST, REPORT, str(report), str(log), adopts]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    pid, host, *notes = done.stdout.splitlines()
    wait_until(report.exists, what="the daemon's report")
    return int(pid), int(host), notes


def test_a_daemon_has_nothing_of_the_process_that_started_it(tmp_path: Path) -> None:
    pid, host, notes = hosted(tmp_path)
    try:
        found = json.loads((tmp_path / "report").read_text())
        assert notes == []
        assert found["parent"] not in (host, os.getpid())
        assert found["session"] not in (host, pid, os.getsid(0))
        assert found["blocked"] == 0
        # Python itself ignores these two.
        assert found["ignored"] == 1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1)
        assert found["oom"] == 0
        assert found["files"] in (["0", "1", "2"], ["0", "1", "2", "3"])  # 3: of the listing itself
        assert found["folder"] == "/"
        assert {name for name in found["env"] if name != "LC_CTYPE"} == {"A"}
        wait_until(lambda: (tmp_path / "new" / "log").read_text() == "some words\n", what="its words in the log")
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_parent_that_would_kill_it_is_told(tmp_path: Path) -> None:
    pid, _, notes = hosted(tmp_path, "adopts")
    os.kill(pid, signal.SIGKILL)
    assert len(notes) == 1
    assert "with_raylet_subreaper" in notes[0]


def test_a_command_that_does_not_exist_is_told_in_the_log(tmp_path: Path) -> None:
    start_daemon(["/nowhere/pdctl"], {}, tmp_path / "log", "pdctl.test")
    wait_until(lambda: "/nowhere/pdctl cannot be executed" in (tmp_path / "log").read_text(), what="the reason")


def test_a_log_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    with pytest.raises(PdctlError, match=r"cannot be started: .*Is a directory"):
        start_daemon([sys.executable], {}, tmp_path / "log", "pdctl.test")
