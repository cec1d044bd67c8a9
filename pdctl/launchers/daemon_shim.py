"""Becomes a daemon, then the command that stdin names. Imports the standard library only; see daemon.py."""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

# For the kernel to give the process to its new parent, seconds.
_PARENT_S = 2.0


def main() -> None:
    """Runs in a session of its own. The caller reads stdout until the command is executed, or nothing is."""
    order = json.load(sys.stdin)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    first = os.getpid()
    if os.fork():
        os._exit(0)
    notes = [*_freed(first, order["killers"]), *_clean(), *_moved(order["group"])]
    os.write(1, json.dumps({"pid": os.getpid(), "notes": notes}).encode())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.closerange(3, 1 << 16)
    try:
        os.execve(order["argv"][0], order["argv"], order["env"])  # noqa: S606 - becoming the command is the point
    except OSError as failure:
        os.write(2, f"{order['argv'][0]} cannot be executed: {failure}\n".encode())
        os._exit(127)


def _freed(first: int, killers: list[int]) -> list[str]:
    """Wait until this process has another parent than the first one."""
    deadline = time.monotonic() + _PARENT_S
    while (parent := os.getppid()) == first and time.monotonic() < deadline:
        time.sleep(0.001)
    if parent not in killers:
        return []
    return [
        "Ray has adopted the agent and may kill it: start Ray without "
        "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper"
    ]


def _clean() -> list[str]:
    """Ray blocks SIGINT, ignores SIGPIPE, and makes its workers the kernel's first victims."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError):  # those that the C library keeps for itself
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    adjusted = Path("/proc/self/oom_score_adj")
    try:
        if int(adjusted.read_text()) > 0:
            adjusted.write_text("0")
    except OSError:
        return ["the kernel kills the agent first when memory is short: only root may change oom_score_adj"]
    return []


def _moved(group: str) -> list[str]:
    """Leave the control group of Ray for one of its own, so that what ends that group does not end this process."""
    own = next((line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")), "/")
    if own == "/":
        return []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _device, place, kind, *_ = line.split()
        if kind == "cgroup2":
            try:
                folder = Path(place) / group
                folder.mkdir(exist_ok=True)
                (folder / "cgroup.procs").write_text("0")
            except OSError as failure:
                return [f"the agent stays in Ray's control group {own}: {failure.strerror}"]
            return []
    return []


if __name__ == "__main__":
    main()
