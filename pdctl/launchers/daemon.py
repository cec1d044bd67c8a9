"""Start a process that belongs to nobody: init is its parent, and nothing of who started it is left in it.

Ray kills what its processes have started, at the latest when a raylet ends. A worker has many threads, so it does not
fork by itself: a small program does (daemon_shim.py).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdctl.errors import PdctlError
from pdctl.host import program

_SHIM = Path(__file__).with_name("daemon_shim.py")
_WITHIN_S = 20.0


@dataclass(frozen=True, slots=True)
class Daemon:
    """`notes`: what could not be had for it."""

    pid: int
    notes: tuple[str, ...] = ()


def start_daemon(
    argv: Sequence[str], env: Mapping[str, str], log: Path, group: str, killers: Sequence[int] = ()
) -> Daemon:
    """Start a command with its output at the end of `log`. `group`: the name of its control group. `killers`:
    processes that kill their children: a note says so if one of them has become the parent. Raises PdctlError.
    """
    order = {"argv": list(argv), "env": dict(env), "log": str(log), "group": group, "killers": list(killers)}
    try:
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        done = subprocess.run(
            [program.executable(), "-I", "-S", str(_SHIM)], input=json.dumps(order).encode(), capture_output=True,
            start_new_session=True, cwd="/", timeout=_WITHIN_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as failure:
        raise PdctlError(f"{argv[0]} cannot be started: {failure}") from failure
    if not done.stdout:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise PdctlError(f"{argv[0]} cannot be started: {said[-1] if said else f'exit code {done.returncode}'}")
    told = json.loads(done.stdout)
    return Daemon(told["pid"], tuple(told["notes"]))
