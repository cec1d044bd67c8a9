"""The names of a prompt's blocks; shortened, as peers and proxies know them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property

from pdctl.engine.cache import prefix
from pdctl.engine.front.core_client import CoreClient
from pdctl.engine.front.kv_events import short
from pdctl.wire import SECRET_ENV


class BlockNames:
    """Of one engine, whose core must be ready."""

    def __init__(self, core: CoreClient) -> None:
        self._core = core

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        assert self._core.ready is not None
        return self._core.ready.block_size

    def of(self, token_ids: Sequence[int], count: int, salt: str) -> Iterator[int]:
        """The short names of a prompt's first `count` blocks, each computed when it is asked for."""
        return map(short, self.whole(token_ids, count, salt))

    def whole(self, token_ids: Sequence[int], count: int, salt: str) -> Iterator[bytes]:
        """Their names, each computed when it is asked for."""
        size, name = self.block_size, prefix.salted(self._root, salt)
        for start in range(0, count * size, size):
            name = prefix.following(name, token_ids[start : start + size])
            yield name

    @cached_property
    def _root(self) -> bytes:
        return prefix.root(self._core.endpoint.manifest, os.environ.get(SECRET_ENV, ""))
