"""Runs between fork and exec of every child: what must be set by the child itself. Standard library only.

argv: a JSON object {parent, cpus}, then the command. A preexec_fn could do this too, but runs in a forked copy of
a process that may have threads.
"""

import ctypes
import json
import os
import resource
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Set death signal, CPU set and limits, then become the command."""
    settings = json.loads(sys.argv[1])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != settings["parent"]:
        sys.exit("the supervisor is gone")
    os.sched_setaffinity(0, settings["cpus"])
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK):
        _, hard = resource.getrlimit(limit)
        resource.setrlimit(limit, (hard, hard))
    command = sys.argv[2:]
    os.execvp(command[0], command)  # noqa: S606 - replacing ourselves is the point


if __name__ == "__main__":
    main()
