"""Paths of this user's files, by the XDG base directory specification."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_OURS = ("PDCTL_CACHE", "PDCTL_STATE", "PDCTL_RUN", "PDCTL_TRACE_DIR")


def cache_root() -> Path:
    """Folder of converted models: `PDCTL_CACHE`, else `$XDG_CACHE_HOME/pdctl`, else `~/.cache/pdctl`."""
    return _under("PDCTL_CACHE", "XDG_CACHE_HOME", Path.home() / ".cache")


def state_root() -> Path:
    """Folder of logs and events that outlive a run: `PDCTL_STATE`, else `$XDG_STATE_HOME/pdctl`."""
    return _under("PDCTL_STATE", "XDG_STATE_HOME", Path.home() / ".local" / "state")


def run_root() -> Path:
    """Folder of sockets and locks of running services. It is short: a unix socket path is limited to 107 bytes."""
    if explicit := os.environ.get("PDCTL_RUN"):
        return Path(explicit).absolute()
    runtime = _xdg("XDG_RUNTIME_DIR")
    if runtime is not None and runtime.is_dir():
        return runtime / "pdctl"
    return Path(tempfile.gettempdir()) / f"pdctl-{os.getuid()}"


def _under(explicit: str, xdg: str, fallback: Path) -> Path:
    if value := os.environ.get(explicit):
        return Path(value).absolute()
    return (_xdg(xdg) or fallback) / "pdctl"


def _xdg(name: str) -> Path | None:
    """The path in an XDG variable; None for a relative one, which the specification says to ignore."""
    value = Path(os.environ.get(name, ""))
    return value if value.is_absolute() else None


def make_variables_absolute() -> None:
    """Make paths in pdctl's own variables absolute, because children run in other folders. Called at command start."""
    for name in _OURS:
        if value := os.environ.get(name):
            os.environ[name] = str(Path(value).absolute())
