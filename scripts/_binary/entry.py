"""The first module of the binary: `pdctl WORDS`, or a part of the control plane as `pdctl -m MODULE WORDS`.

pdctl/host/program.py makes these command lines.
"""

from __future__ import annotations

import os
import sys

PARTS = ("pdctl", "pdctl.doctor", "pdctl.proxy", "pdctl.supervisor", "pdctl.supervisor.process.spawn_shim")


def restore_library_path() -> None:
    """Undo what the freezer's loader did to the environment: children are other programs with their own libraries."""
    before = os.environ.pop("LD_LIBRARY_PATH_ORIG", None)
    if before is None:
        os.environ.pop("LD_LIBRARY_PATH", None)
    else:
        os.environ["LD_LIBRARY_PATH"] = before
    for name in ("_PYI_APPLICATION_HOME_DIR", "_PYI_ARCHIVE_FILE", "_PYI_PARENT_PROCESS_LEVEL", "_PYI_SPLASH_IPC"):
        os.environ.pop(name, None)


def main() -> None:
    """Run the module named by `-m`, else the command line."""
    restore_library_path()
    if len(sys.argv) < 3 or sys.argv[1] != "-m":
        from pdctl.cli import main as command_line

        command_line()
    elif sys.argv[2] not in PARTS:
        sys.exit(f"error: this binary has no {sys.argv[2]}\nhint: engines need a Python of their own: set PDCTL_PYTHON")
    else:
        import runpy

        module = sys.argv[2]
        # As `python -m` leaves it: the module, then its words.
        sys.argv[:3] = [module]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
