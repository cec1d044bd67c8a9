"""Connections of a proxy that was asked for takeover, but whose TLS or CORS rules it out: counted, and nothing else."""

from __future__ import annotations

import asyncio
from typing import Any

from pdctl.proxy.client.connections import BoundedProtocol
from pdctl.proxy.takeover.cover import CoverCounts


class UncoveredProtocol(BoundedProtocol):
    """Counts its connection. `options`: those of uvicorn's protocols."""

    def __init__(self, counts: CoverCounts, **options: Any) -> None:
        super().__init__(**options)
        self._counts = counts

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.BaseProtocol."""
        self._counts.uncovered += 1
        self._counts.open_uncovered += 1
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.BaseProtocol."""
        self._counts.open_uncovered -= 1
        super().connection_lost(exc)
