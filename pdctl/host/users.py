"""Where this user's files go, by the XDG base directory specification."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_root() -> Path:
    """Converted models: `PDCTL_CACHE`, else `$XDG_CACHE_HOME/pdctl`, else `~/.cache/pdctl`."""
    return _under("PDCTL_CACHE", "XDG_CACHE_HOME", Path.home() / ".cache")


def state_root() -> Path:
    """Logs and events that outlive a run: `PDCTL_STATE`, else `$XDG_STATE_HOME/pdctl`."""
    return _under("PDCTL_STATE", "XDG_STATE_HOME", Path.home() / ".local" / "state")


def run_root() -> Path:
    """Sockets and locks of running services. Short, because a unix socket path has 107 bytes."""
    if explicit := os.environ.get("PDCTL_RUN"):
        return Path(explicit)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir():
        return Path(runtime) / "pdctl"
    return Path(tempfile.gettempdir()) / f"pdctl-{os.getuid()}"


def _under(explicit: str, xdg: str, fallback: Path) -> Path:
    if value := os.environ.get(explicit):
        return Path(value)
    base = os.environ.get(xdg)
    return (Path(base) if base else fallback) / "pdctl"
