"""Engine kinds, one folder each. A kind implements up to three interfaces, each loaded on first use:

- `launcher.py`, `LAUNCHER`: makes a command line from settings, for the plan. A kind without one is attached by URL.
- `dialect.py`, `DIALECT`: builds the proxy's requests and parses the engine's answers. `DIALECTS`, if a kind has it:
  other dialects, by connector.
- `control.py`, `CONTROL`: makes the supervisor's calls to an engine, and lists what engines of this kind support.

The registry below lists the built-in kinds. PDCTL_ENGINE_KINDS adds others: NAME=PACKAGE, separated by commas.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from typing import cast

from pdctl.adapters.control import Ability, Control, NoControl, Peer, Progress, Target
from pdctl.adapters.dialect import (
    ALL_ROLES,
    UNKNOWN_TOKEN,
    Attempt,
    Call,
    CannotResume,
    Condition,
    Delta,
    Dialect,
    Fields,
    HandShake,
    Pairing,
    Prefilled,
    RequestState,
    Retelling,
    RoomProbe,
    Tokenizer,
    stream_fields,
    without,
)
from pdctl.adapters.launcher import (
    OTLP_EXPORTERS,
    Assignment,
    BaseLauncher,
    Fault,
    Installed,
    KnownFailure,
    Launch,
    Launcher,
    Package,
    different_installations,
    events_endpoints,
    option_faults,
    version_numbers,
)
from pdctl.errors import PdctlError
from pdctl.net.openai.answers import Choice, EngineError, shown

__all__ = [
    "ALL_ROLES", "KINDS_ENV", "OTLP_EXPORTERS", "UNKNOWN_TOKEN", "Ability", "Assignment", "Attempt", "BaseLauncher",
    "Call", "CannotResume", "Choice", "Condition", "Control", "Delta", "Dialect", "EngineError", "Fault", "Fields",
    "HandShake", "Installed", "KnownFailure", "Launch", "Launcher", "NoControl", "Package", "Pairing", "Peer",
    "Prefilled", "Progress", "RequestState", "Retelling", "RoomProbe", "Target", "Tokenizer", "can_launch", "control",
    "dialect", "different_installations", "events_endpoints", "kinds", "launcher", "option_faults", "shown",
    "stream_fields", "version_numbers", "without",
]  # fmt: skip

KINDS_ENV = "PDCTL_ENGINE_KINDS"
_REGISTRY = {
    "builtin": "pdctl.adapters.builtin",
    "lmdeploy": "pdctl.adapters.lmdeploy",
    "sglang": "pdctl.adapters.sglang",
    "vllm": "pdctl.adapters.vllm",
}


@cache
def _registry() -> dict[str, str]:
    """Package by kind. Raises PdctlError if PDCTL_ENGINE_KINDS is invalid."""
    found = dict(_REGISTRY)
    for entry in filter(None, os.environ.get(KINDS_ENV, "").split(",")):
        name, _, package = entry.strip().partition("=")
        # A built-in kind cannot be replaced: a topology must mean the same everywhere.
        if not name.isidentifier() or not package or name in found:
            hint = "write NAME=PACKAGE, such as mine=my_company.engines.mine, with a name that is not in use"
            raise PdctlError(f"{KINDS_ENV} has an entry that does not define a new engine kind: {entry!r}", hint)
        for face in ("dialect", "control"):
            if reason := _missing(f"{package}.{face}"):
                hint = f"install the package, or set PYTHONPATH; it needs {package}.dialect and {package}.control"
                raise PdctlError(f"{KINDS_ENV} names engine kind {name!r}, which cannot be loaded: {reason}", hint)
        found[name] = package
    return found


def _missing(module: str) -> str:
    """Why a module cannot be found; "" if it can. Executes the packages above it, but not the module."""
    try:
        return "" if importlib.util.find_spec(module) else f"no module named {module!r}"
    except ImportError as failure:
        return str(failure)


def kinds() -> tuple[str, ...]:
    """The names of all kinds, sorted."""
    return tuple(sorted(_registry()))


def can_launch(kind: str) -> bool:
    """Whether pdctl can start engines of this kind."""
    return not _missing(f"{_registry()[kind]}.launcher")


def launcher(kind: str) -> Launcher:
    """The launcher of a kind that pdctl can start."""
    return cast(Launcher, _face(kind, "launcher"))


def dialect(kind: str, connector: str = "") -> Dialect:
    """The dialect of a known kind. A kind may speak another one with engines of a certain connector (DIALECTS)."""
    module = importlib.import_module(f"{_registry()[kind]}.dialect")
    others: dict[str, Dialect] = getattr(module, "DIALECTS", {})
    return others.get(connector) or cast(Dialect, module.DIALECT)


def control(kind: str) -> Control:
    """The control interface of a known kind."""
    return cast(Control, _face(kind, "control"))


def _face(kind: str, face: str) -> object:
    return getattr(importlib.import_module(f"{_registry()[kind]}.{face}"), face.upper())
