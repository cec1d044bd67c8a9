"""How this pdctl was started, and the command lines that start its parts in the same way.

Installed by pip, pdctl is a Python package, and its parts are `PYTHON -m pdctl...`. The binary (scripts/binary) has its
own Python inside and takes the same `-m MODULE`, for the modules of the control plane only. Engines need packages that
the binary does not have: they run under the interpreter of their group (`python` in [[engines]]).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# The interpreter of engines and stores whose group names none.
PYTHON_ENV = "PDCTL_PYTHON"
# Set by the binary for itself: its file. What runs is what it unpacked from there.
FILE_ENV = "PDCTL_BINARY"
# How to get an interpreter for engines of the builtin kind.
ENGINE_HINT = (
    "make an environment: python3 -m venv ~/engine && ~/engine/bin/pip install 'pdctl[engine]'; "
    f'then set python = "~/engine/bin/python" in [[engines]], or {PYTHON_ENV}=~/engine/bin/python'
)


def is_binary() -> bool:
    """Whether this is the binary, which has its own Python inside."""
    return bool(getattr(sys, "frozen", False))


def executable() -> str:
    """The executable that takes `-m MODULE` and runs a part of the control plane."""
    return sys.executable


def pdctl(*words: str) -> list[str]:
    """The command line of `pdctl WORDS`."""
    return [executable(), *words] if is_binary() else [executable(), "-m", "pdctl", *words]


def lasting(*words: str) -> list[str]:
    """The command line of `pdctl WORDS` for a file that outlives this process: it names the binary itself."""
    file = os.environ.get(FILE_ENV) if is_binary() else None
    return [file, *words] if file else pdctl(*words)


def part(module: str, *words: str) -> list[str]:
    """The command line of a part of the control plane, such as pdctl.supervisor."""
    return [executable(), "-m", module, *words]


def spawn_shim(script: Path, *words: str) -> list[str]:
    """The command line of the small script between fork and exec, without anything that it does not need."""
    if is_binary():
        return part("pdctl.supervisor.process.spawn_shim", *words)
    return [executable(), "-I", "-S", str(script), *words]


def engine_python() -> str:
    """The interpreter of engines and stores whose group names none; "" if there is none."""
    if named := os.environ.get(PYTHON_ENV):
        return str(Path(named).expanduser().absolute())
    return "" if is_binary() else sys.executable


def engine(python: str, verb: str, *words: str) -> list[str]:
    """The command line of a part of the builtin engine under this interpreter."""
    assert python, "callers check that there is an interpreter"
    return [python, "-m", "pdctl.engine", verb, *words]


def this_engine(verb: str, *words: str) -> list[str]:
    """The command line of another part of the engine that this process is a part of."""
    return engine(sys.executable, verb, *words)
