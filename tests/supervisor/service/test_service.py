"""A service that is told to stop while it is being made ends in order."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pdctl.supervisor.rundir.journal import EVENTS, read_entries
from tests.service import REPOSITORY
from tests.supervisor.fleet import plan_of, shell

_SCRIPT = """
import asyncio, os, signal, sys
from pathlib import Path
from pdctl.supervisor.service import service as module
from tests.supervisor.fleet import plan_of, shell

class Interrupted(module.RunningService):
    def __init__(self, *given):
        os.kill(os.getpid(), signal.SIGTERM)
        super().__init__(*given)

module.RunningService = Interrupted
plan = plan_of(Path(sys.argv[1]), shell("a", "exec sleep 600"))
asyncio.run(module.Service(plan, lambda name, message: None).run())
"""


def test_a_stop_while_the_parts_are_made_is_a_stop(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(tmp_path)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    plan = plan_of(tmp_path, shell("a", "x"))
    assert not Path(plan.run_dir).exists(), "nothing is left"
    events = [entry["event"] for entry in read_entries(Path(plan.log_dir), EVENTS)]
    assert events.count("started") == events.count("exited"), "what was started in that moment was ended"
