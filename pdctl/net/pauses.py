"""Notice that this process itself stood still: it was stopped, or its machine was, or it got no CPU."""

from __future__ import annotations

import asyncio
import time

# A loop that wakes so much later than it meant to has not seen what others did meanwhile, seconds.
STOOD_STILL_S = 1.0
# A process that is late each time has too little CPU for good. Others must still be judged.
_MOST_IN_A_ROW = 3


class Sleeper:
    """Sleeps of one loop."""

    def __init__(self) -> None:
        self._in_a_row = 0

    async def overslept(self, seconds: float) -> bool:
        """Sleep. Returns whether this process stood still meanwhile: then it has measured its own silence, not that of
        others. At most three times in a row."""
        due = time.monotonic() + seconds
        await asyncio.sleep(seconds)
        self._in_a_row = self._in_a_row + 1 if time.monotonic() - due > STOOD_STILL_S else 0
        return 0 < self._in_a_row <= _MOST_IN_A_ROW
