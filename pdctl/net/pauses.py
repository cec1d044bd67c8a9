"""Notice that this process itself stood still: it was stopped, or its machine was, or it got no CPU."""

from __future__ import annotations

import asyncio
import time

# A loop that wakes so much later than it meant to has not seen what others did meanwhile, seconds.
STOOD_STILL_S = 1.0


async def overslept(seconds: float) -> bool:
    """Sleep. Returns whether this process stood still meanwhile: then it has measured its own silence, not that of
    others."""
    due = time.monotonic() + seconds
    await asyncio.sleep(seconds)
    return time.monotonic() - due > STOOD_STILL_S
