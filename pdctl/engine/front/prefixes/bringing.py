"""Decides before a prompt is computed whether the KV of its beginning is brought from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from pdctl.engine.front.core_client import CoreClient
from pdctl.engine.front.prefixes.feed import BlockFeed
from pdctl.engine.front.prefixes.names import BlockNames
from pdctl.engine.front.prefixes.prompt import Prompt, Source, Way
from pdctl.latency import Work

# To bring KV must be predicted to take this part of the time to compute at most: predictions err, and others wait.
_WORTH = 0.8
# What can take so little to compute is not looked for anywhere, seconds.
_LITTLE_S = 0.002
# More at once would only wait for each other.
_AT_ONCE = 8


class Bringer:
    """`sources`: where KV can come from. `always`: bring whatever there is more of elsewhere, even if to compute it is
    predicted to be faster."""

    def __init__(
        self, core: CoreClient, here: BlockFeed, names: BlockNames, sources: Sequence[Source], always: bool
    ) -> None:
        self._core = core
        self._here = here
        self._names = names
        self._sources = sources
        self._always = always
        self._running = 0

    async def bring(self, token_ids: Sequence[int], salt: str) -> None:
        """Bring the KV of a prompt's beginning here, if that is worth it. Never raises for what it comes from."""
        work = self._core.books.work
        if self._running >= _AT_ONCE or not (self._always or _is_long(work, len(token_ids))):
            return
        self._running += 1
        try:
            prompt = Prompt(token_ids, salt, self._names, self._here)
            ways = [way for source in self._sources for way in await source.ways(prompt)]
            chosen = self._best(prompt, ways, work)
            if chosen is not None:
                await chosen.bring()
        finally:
            self._running -= 1

    def _best(self, prompt: Prompt, ways: list[Way], work: Work | None) -> Way | None:
        """The way that saves most; None if none does."""
        if self._always:
            return max(ways, key=lambda way: (way.num_blocks, -way.seconds), default=None)
        best = max(ways, key=lambda way: _saved_s(prompt, way, work), default=None)
        return best if best is not None and _saved_s(prompt, best, work) > 0 else None


def _saved_s(prompt: Prompt, way: Way, work: Work | None) -> float:
    """Seconds that a way saves, by predictions that may err."""
    if work is None:
        return 0.0
    own = prompt.own(way.num_blocks) * prompt.block_size
    tokens = way.num_blocks * prompt.block_size - own
    return _WORTH * work.times.prompt_s(tokens, own, work.budget) - way.seconds


def _is_long(work: Work | None, tokens: int) -> bool:
    return work is not None and work.times.prompt_s(tokens, 0, work.budget) > _LITTLE_S
