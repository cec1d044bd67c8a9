"""Loads the CUDA runtime of cudart.c into this process, as torch loads the real one."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

_RUNTIME, _DRIVER = "libcudart.so.12", "libcuda.so.1"
NO_COMPILER = "" if shutil.which("gcc") else "NOT TESTED: no gcc, to compile the CUDA runtime of the tests"


@cache
def load() -> None:
    """Build it, and load it into this process. Raises FileNotFoundError without a compiler."""
    folder = Path(tempfile.mkdtemp())
    build(folder)
    use(folder)
    # A file that is mapped can go; its name stays in /proc/self/maps, marked: so the folder is kept until the end.
    import atexit

    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def build(folder: Path) -> None:
    """Build it in a folder. Raises FileNotFoundError without a compiler."""
    runtime, source = folder / _RUNTIME, Path(__file__).with_name("cudart.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-o", runtime, source], check=True)
    (folder / _DRIVER).write_bytes(runtime.read_bytes())


def use(folder: Path) -> None:
    """Load what was built there into this process."""
    for name in (_RUNTIME, _DRIVER):
        ctypes.CDLL(str(folder / name))
