"""Kernels in C++ for CPUs, compiled on the machine that runs them, and how they are compiled.

They are plain functions without any library: compiling takes a second, once per machine, and needs only a compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

from pdctl.host.cached_file import locked
from pdctl.host.processor import cpu_name
from pdctl.host.users import cache_root

_FOLDER = Path(__file__).parent
_SOURCES = ("attention.cpp", "rows.cpp", "products.cpp")
_HEADERS = ("vectors.h",)
# Loops are vectorized by hand. g++ 12 stored a loop that it vectorized itself to memory that was not aligned for that.
_FLAGS = ("-O3", "-fno-tree-vectorize", "-march=native", "-std=c++17", "-shared", "-fPIC")
_COMPILE_S = 120.0
_LOCK_S = 150.0


class NotCompiled(Exception):
    """There is no library; the message gives the reason."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The compiled kernels, of the user's cache or compiled now. Raises NotCompiled."""
    compiler = _compiler()
    source = [(_FOLDER / name).read_bytes() for name in _SOURCES + _HEADERS]
    key = (source, _said(compiler, "--version"), cpu_name(), _FLAGS)
    path = cache_root() / "kernels" / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.so"
    try:
        if not path.exists():
            with locked(path.with_suffix(".lock"), _LOCK_S):
                if not path.exists():
                    _compile(compiler, path)
        return _loaded(compiler, path)
    except OSError as failure:
        raise NotCompiled(f"{path} cannot be used: {failure}") from failure


def version() -> str:
    """Identifies the kernels, of a library that was loaded or can be. "" without one."""
    try:
        return Path(library()._name).stem
    except NotCompiled:
        return ""


def _loaded(compiler: str, path: Path) -> ctypes.CDLL:
    """Load the library; one that was damaged, by a full disk or a power failure, is compiled again once."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        with locked(path.with_suffix(".lock"), _LOCK_S):
            _compile(compiler, path)
        return ctypes.CDLL(str(path))


def _compiler() -> str:
    for name in (os.environ.get("CXX", ""), "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise NotCompiled("no C++ compiler: install g++ or clang++, or set CXX")


def _compile(compiler: str, path: Path) -> None:
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        _said(compiler, *_FLAGS, *(str(_FOLDER / name) for name in _SOURCES), "-o", str(part))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _said(*words: str) -> str:
    """The output of a compiler's run. Raises NotCompiled."""
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMPILE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as failure:
        raise NotCompiled(f"{words[0]} failed: {failure}") from failure
    if done.returncode:
        raise NotCompiled(f"{words[0]} failed: {' '.join(done.stderr.split())[:300]}")
    return done.stdout
