"""Keeps an engine's latency model in the user's cache, so that only the first start of its kind measures."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from pdctl.engine.schedule.latency import LatencyModel
from pdctl.host.cached_file import locked, replace
from pdctl.latency import KINDS, Kind, Step
from pdctl.latency.fit import Sums

# How long an engine waits for another one that measures the same, seconds.
_LOCK_S = 30.0


class _Kept(msgspec.Struct, frozen=True):
    """The file. `key`: what the measurements depend on, for people."""

    key: tuple[str, ...]
    measured: dict[Kind, Sums]
    format: Literal[1] = 1


class LatencyFile:
    """The file of one (model, device, number type, threads) in `folder`. `key`: these, as words."""

    def __init__(self, folder: Path, key: tuple[str, ...]) -> None:
        self._key = key
        self._path = folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.json"

    def load(self, measure: Callable[[], LatencyModel]) -> LatencyModel:
        """The kept model, or else one that is measured now and kept. Engines that start together measure one after
        another, and only once."""
        found = self._read()
        if found is not None:
            return found
        try:
            with locked(self._path.with_suffix(".lock"), _LOCK_S):
                found = self._read()
                if found is None:
                    found = measure()
                    self.save(found)
                return found
        except OSError as failure:
            logging.warning("%s cannot be used, so this start measures: %s", self._path, failure)
            return found or measure()

    def save(self, model: LatencyModel) -> None:
        """Keep what the engine has learned. A cache that cannot be written is no error: the next start measures."""
        content = msgspec.json.encode(_Kept(self._key, model.measured))
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace(self._path, content)

    def _read(self) -> LatencyModel | None:
        """None if there is no file, or a broken one."""
        kept = read_kept(self._path)
        return kept[1] if kept is not None and kept[0] == self._key else None


def read_kept(path: Path) -> tuple[tuple[str, ...], LatencyModel] | None:
    """The key and the model of a file; None if there is none, or a broken one."""
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=_Kept)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    width = len(Step().row)
    whole = set(kept.measured) == set(KINDS) and all(
        len(sums.totals) == len(sums.products) == width and all(len(row) == width for row in sums.products)
        for sums in kept.measured.values()
    )
    return (kept.key, LatencyModel(kept.measured)) if whole else None
