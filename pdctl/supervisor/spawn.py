"""Between fork and exec: a child gets its death signal, CPU set, limits, cgroup and stamp.

CPU set and limits are inherited from us, who take them on for the moment of the fork; the rest is done by `sh` and
util-linux's `setpriv`, which start in a millisecond where an interpreter takes fifteen. A preexec_fn could do it too,
but runs in a forked copy of a process that may have threads.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pdctl.plan import ProcessSpec
from pdctl.wire import EPOCH_ENV, LISTEN_FD_ENV, UNIT_ENV

_SHIM = Path(__file__).with_name("spawn_shim.py")
# $0: our pid; $1: cgroup.procs or "". A supervisor that died before this line shall have no child.
_JOIN = '[ "$PPID" = "$0" ] || exit 1; if [ -n "$1" ]; then echo 0 >"$1"; fi; shift; '
# $0: where the exit code is left; $1: cgroup.procs or "". The leader's pid is written by the leader itself.
_RECORD = (
    'if [ -n "$1" ]; then echo 0 >"$1"; fi; shift; '
    """{die} sh -c 'echo $$ >"$0.pid"; exec "$@"' "$0" "$@"; """
    'code=$?; echo $code >"$0.new"; mv "$0.new" "$0"; exit $code'
)


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a process. `record`: a file for its exit code and, beside it, its pid: it shall outlive us."""

    spec: ProcessSpec
    env: dict[str, str]
    stamp: str
    epoch: str
    listen_fd: int | None
    join: Path | None
    record: Path | None


def raise_limits() -> None:
    """Open files and locked memory as far as we may: children inherit them. RDMA registration pins memory."""
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK):
        _, hard = resource.getrlimit(limit)
        resource.setrlimit(limit, (hard, hard))


def spawn(start: Start, log: int) -> subprocess.Popen[bytes]:
    """Start it, output into descriptor `log`. Raises OSError. Main thread only: the death signal follows the thread."""
    env = {**os.environ, **start.spec.env, **start.env, EPOCH_ENV: start.epoch, "PYTHONUNBUFFERED": "1"}
    env[UNIT_ENV] = start.stamp.partition("=")[2]
    if start.listen_fd is not None:
        env[LISTEN_FD_ENV] = str(start.listen_fd)
    with _on_cpus(start.spec.cpus):
        return subprocess.Popen(
            _argv(start), env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            pass_fds=() if start.listen_fd is None else (start.listen_fd,),
        )  # fmt: skip


def _argv(start: Start) -> list[str]:
    command = list(start.spec.argv)
    if shutil.which(command[0], path=start.spec.env.get("PATH")) is None:
        raise FileNotFoundError(f"{command[0]} does not exist or cannot be executed")
    setpriv = shutil.which("setpriv")
    join = str(start.join or "")
    if start.record is not None:
        die = f"{setpriv} --pdeathsig KILL --" if setpriv else ""
        return ["/bin/sh", "-c", _RECORD.format(die=die), str(start.record), join, *command]
    if setpriv is None:
        return [sys.executable, "-I", "-S", str(_SHIM), str(os.getpid()), join, *command]
    return ["/bin/sh", "-c", f'{_JOIN} exec {setpriv} --pdeathsig TERM -- "$@"', str(os.getpid()), join, *command]


@contextlib.contextmanager
def _on_cpus(cpus: tuple[int, ...]) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    if not cpus or set(cpus) == before:
        yield
        return
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
