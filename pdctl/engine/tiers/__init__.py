"""Where KV is kept that the engine's own pool has no room for: tiers, one file per kind.

A block goes to the tiers when nobody uses it any more, in the background: one that is given up before that is dropped.
It comes back when a prompt needs it and to read it is predicted to be faster than to compute it. Whatever a tier does
not have, does not give in time or gives wrong is computed: a tier costs time, never a token.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

# Blocks as bytes, [blocks, bytes of one]: each with all layers and heads, in the order of the manifest.
Rows = npt.NDArray[np.uint8]


class TierRefused(Exception):
    """A tier cannot be used as it is configured, and a restart would not help."""


class TierFailed(Exception):
    """A tier did not answer, or said that it failed."""


@dataclass(slots=True)
class TierCounts:
    """Counts of blocks since the start. `wrong`: of those that were asked for, the ones that were not what they should
    be; `refused`: those that the tier had no room for, or that it failed to take."""

    stored: int = 0
    refused: int = 0
    loaded: int = 0
    wrong: int = 0


class Tier(Protocol):
    """One tier. Used by several threads. Every call ends in time."""

    name: str
    counts: TierCounts

    @property
    def is_there(self) -> bool:
        """Whether it can be used at the moment."""
        ...

    @property
    def num_blocks(self) -> int:
        """Blocks that it has, as far as that is known here."""
        ...

    def leading(self, names: Sequence[bytes]) -> int:
        """How many of the first names it has. Raises TierFailed."""
        ...

    def missing(self, names: Sequence[bytes]) -> list[bool]:
        """Which of these it does not have. Raises TierFailed."""
        ...

    def get(self, names: Sequence[bytes]) -> Rows:
        """The blocks with these names, up to the first that is not there or not right. Raises TierFailed."""
        ...

    def put(self, names: Sequence[bytes], rows: Rows, tenants: Sequence[str]) -> None:
        """Keep blocks, as far as there is room. Raises TierFailed."""
        ...

    def changes(self) -> tuple[list[bytes], list[bytes]]:
        """Names that came and that went since the last call, if only this engine has them; else nothing."""
        ...

    def close(self) -> None:
        """The engine ends."""
        ...


class StoreKind(Protocol):
    """What the module of a store's kind has."""

    def open_store(self, prefix: str, secret: str, block_bytes: int) -> Tier:
        """The store that the environment describes. `prefix`: of all keys; `secret`: see Sealed. Raises TierRefused."""
        ...


_STORES = {"mooncake": "pdctl.engine.tiers.mooncake"}


def store_kind(name: str) -> StoreKind:
    """A kind of store, loaded when it is chosen. Raises TierRefused."""
    if name not in _STORES:
        raise TierRefused(
            f"engines of kind 'builtin' cannot use stores of kind {name!r}; they know: {', '.join(_STORES)}"
        )
    return cast(StoreKind, importlib.import_module(_STORES[name]))
