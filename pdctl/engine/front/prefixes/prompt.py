"""A prompt that is to be computed, and the ways to bring the KV of its beginning here instead."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from pdctl.engine.front.kv_events import short
from pdctl.engine.front.prefixes.feed import BlockFeed
from pdctl.engine.front.prefixes.names import BlockNames


class Prompt:
    """Its tokens and its blocks. The last token is always computed: it gives the first one of the answer. So it is in
    none of the `num_blocks` that can be brought. Names of blocks cost a digest each, and are computed as far as they
    are asked for."""

    def __init__(self, token_ids: Sequence[int], salt: str, names: BlockNames, here: BlockFeed) -> None:
        self.token_ids = token_ids
        self.salt = salt
        self.block_size = names.block_size
        self.num_blocks = (len(token_ids) - 1) // names.block_size
        self._names: list[bytes] = []
        self._more = names.whole(token_ids, self.num_blocks, salt)
        self._here = here

    def names(self, count: int) -> list[bytes]:
        """The names of its first `count` blocks."""
        while len(self._names) < count:
            self._names.append(next(self._more))
        return self._names[:count]

    def short_names(self) -> Iterator[int]:
        """The short names of its blocks, each computed when it is asked for."""
        for number in range(self.num_blocks):
            yield short(self.names(number + 1)[number])

    def own(self, count: int) -> int:
        """How many of its first `count` blocks are here."""
        for number, name in enumerate(self.short_names()):
            if number >= count or not self._here.has(name):
                return number
        return self.num_blocks


# To bring KV is given up after so many times its predicted time, or this long, seconds.
_PATIENCE, _LEAST_S, _MOST_S = 4.0, 0.5, 10.0


def patience_s(predicted_s: float) -> float:
    """How long to wait for KV that was predicted to take so long, seconds."""
    return min(_MOST_S, max(_LEAST_S, _PATIENCE * predicted_s))


@dataclass(slots=True)
class Totals:
    """What came from one source since the start, for metrics. `tokens`: those that did not have to be computed; `lost`:
    beginnings of prompts that did not come."""

    prefixes: int = 0
    tokens: int = 0
    lost: int = 0

    def note(self, tokens: int) -> None:
        """The KV of so many tokens has come."""
        self.prefixes += 1
        self.tokens += tokens


class Way(NamedTuple):
    """A way to bring the KV of a prompt's first `num_blocks` blocks here, in so many predicted seconds."""

    num_blocks: int
    seconds: float
    bring: Callable[[], Awaitable[None]]


class Source(Protocol):
    """Where KV can be brought from. Whatever goes wrong there costs time only."""

    async def ways(self, prompt: Prompt) -> list[Way]:
        """The ways to bring this prompt's beginning from there, if there are any."""
        ...
