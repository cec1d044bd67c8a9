"""KV stores, one folder per kind, loaded on first use. Each has `launcher.py` with `LAUNCHER`: see StoreLauncher.

The registry below lists the kinds.
"""

from __future__ import annotations

import importlib
from typing import cast

from pdctl.stores.launcher import Reader, StoreClient, StoreLaunch, StoreLauncher, StorePlace

__all__ = ["Reader", "StoreClient", "StoreLaunch", "StoreLauncher", "StorePlace", "store_kinds", "store_launcher"]

_REGISTRY = {
    "lmcache": "pdctl.stores.lmcache",
    "mooncake": "pdctl.stores.mooncake",
}


def store_kinds() -> tuple[str, ...]:
    """The names of all kinds, sorted."""
    return tuple(sorted(_REGISTRY))


def store_launcher(kind: str) -> StoreLauncher:
    """The launcher of a known kind."""
    return cast(StoreLauncher, importlib.import_module(f"{_REGISTRY[kind]}.launcher").LAUNCHER)
