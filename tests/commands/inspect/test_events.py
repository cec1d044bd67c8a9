"""`pdctl events`: what the journal has, and what is written meanwhile, in one piece across its files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pdctl.supervisor.rundir import journal as journals
from pdctl.supervisor.rundir.journal import Journal


def test_events_are_followed_across_a_full_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "_MOST", 1000)
    journal = Journal(tmp_path / "s" / "t" / "logs", lambda name, message: None)
    journal.say("a", "0")
    journal.say("b", "another's")
    env = {**os.environ, "PDCTL_STATE": str(tmp_path / "s"), "PDCTL_RUN": str(tmp_path / "r")}
    argv = [sys.executable, "-m", "pdctl", "events", "-f", "-s", "t", "--process", "a"]
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) as followed:
        assert followed.stdout is not None
        for number in range(40):
            assert json.loads(followed.stdout.readline())["message"] == str(number)
            journal.say("a", str(number + 1))
        followed.send_signal(signal.SIGINT)
        assert [json.loads(line)["message"] for line in followed.stdout] in ([], ["40"])
    assert followed.returncode == 0


def test_events_end_where_nobody_follows(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "s" / "t" / "logs", lambda name, message: None)
    for number in range(3):
        journal.say("a", str(number), "ready", after_s=1.5)
    env = {**os.environ, "PDCTL_STATE": str(tmp_path / "s"), "PDCTL_RUN": str(tmp_path / "r")}
    argv = [sys.executable, "-m", "pdctl", "events", "-s", "t"]
    told = subprocess.run(argv, env=env, capture_output=True, text=True, check=True).stdout
    assert told == (tmp_path / "s" / "t" / "logs" / journals.EVENTS).read_text()
