"""Where this user's files go, by the XDG base directory specification."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_OURS = ("PDCTL_CACHE", "PDCTL_STATE", "PDCTL_RUN", "PDCTL_TRACE_DIR")


def cache_root() -> Path:
    """Converted models: `PDCTL_CACHE`, else `$XDG_CACHE_HOME/pdctl`, else `~/.cache/pdctl`."""
    return _under("PDCTL_CACHE", "XDG_CACHE_HOME", Path.home() / ".cache")


def state_root() -> Path:
    """Logs and events that outlive a run: `PDCTL_STATE`, else `$XDG_STATE_HOME/pdctl`."""
    return _under("PDCTL_STATE", "XDG_STATE_HOME", Path.home() / ".local" / "state")


def run_root() -> Path:
    """Sockets and locks of running services. Short, because a unix socket path has 107 bytes."""
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
    """The specification has relative paths ignored."""
    value = Path(os.environ.get(name, ""))
    return value if value.is_absolute() else None


def make_variables_absolute() -> None:
    """Our own variables that name files, as seen from here: children run elsewhere. Called where a command begins."""
    for name in _OURS:
        if value := os.environ.get(name):
            os.environ[name] = str(Path(value).absolute())
