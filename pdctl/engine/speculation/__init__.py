"""Guesses of a sequence's next tokens, which a step verifies: several tokens for little more than the cost of one.

A guess only saves time. What is sampled at each position decides, so the output is the same with any guesses. One file
a kind; a new one is a class with `draft`, a line in `_KINDS` and its settings in `pdctl.speculative`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from pdctl.engine.speculation.ngram import NgramDrafter
from pdctl.speculative import Speculative


class Drafter(Protocol):
    """Guesses the next tokens of one sequence."""

    def draft(self, token_ids: Sequence[int], most: int) -> list[int]:
        """Up to `most` guesses of what follows `token_ids`, which since the last call has only grown. A call costs time
        in proportion to what has been added, and never more than a few milliseconds."""
        ...


_KINDS: dict[str, Callable[[Speculative], Drafter]] = {
    "ngram": lambda settings: NgramDrafter(settings.min_ngram, settings.max_ngram),
}


def drafter(settings: Speculative) -> Drafter:
    """A drafter for one more sequence."""
    return _KINDS[settings.kind](settings)
