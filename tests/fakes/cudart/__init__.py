"""Loads the CUDA runtime of cudart.c into this process, as torch loads the real one."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

NO_COMPILER = "" if shutil.which("gcc") else "NOT TESTED: no gcc, to compile the CUDA runtime of the tests"


@cache
def load() -> None:
    """Raises FileNotFoundError without a compiler."""
    folder = Path(tempfile.mkdtemp())
    runtime, driver = folder / "libcudart.so.12", folder / "libcuda.so.1"
    source = Path(__file__).with_name("cudart.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-o", runtime, source], check=True)
    driver.write_bytes(runtime.read_bytes())
    for path in (runtime, driver):
        ctypes.CDLL(str(path))
    # A file that is mapped can go; its name stays in /proc/self/maps, marked: so the folder is kept until the end.
    import atexit

    atexit.register(shutil.rmtree, folder, ignore_errors=True)
