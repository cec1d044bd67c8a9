"""Waiting in an event loop until something holds, which is looked at whenever there is news."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_LONG_S = 120


class News:
    """`tell` is called by whatever changes what `until` waits for."""

    def __init__(self) -> None:
        self._told = asyncio.Event()

    def tell(self) -> None:
        """There is news."""
        self._told.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Until it holds. Raises TimeoutError after two minutes."""
        async with asyncio.timeout(_LONG_S):
            while not holds():
                self._told.clear()
                await self._told.wait()
