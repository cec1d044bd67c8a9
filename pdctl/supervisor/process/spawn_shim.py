"""Runs between fork and exec if setpriv is missing. Standard library only. argv: parent, cgroup.procs, command."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Set the death signal, enter the cgroup, then become the command."""
    parent, join, *command = sys.argv[1:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != int(parent):
        sys.exit("the supervisor is gone")
    if join:
        with open(join, "w") as file:  # noqa: PTH123 - pathlib takes longer to import than this to run
            file.write("0")
    os.execvp(command[0], command)  # noqa: S606 - replacing ourselves is the point


if __name__ == "__main__":
    main()
