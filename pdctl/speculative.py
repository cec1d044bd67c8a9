"""The settings of speculative decoding, as a topology and an engine's command line name them."""

from __future__ import annotations

import msgspec

SPECULATIVE_KINDS = ("ngram",)
# Guesses of one sequence in one step, and tokens that are looked up, at most.
MOST_TOKENS = 64
LONGEST_NGRAM = 32


class Speculative(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`tokens`: guesses for each sequence and step, at most. `min_ngram` and `max_ngram`: the number of newest tokens
    that must have occurred before, and the number that is compared to choose among several places."""

    kind: str
    tokens: int = 4
    min_ngram: int = 2
    max_ngram: int = 4

    @property
    def wrong(self) -> str:
        """What is wrong with the settings, "" if nothing is."""
        if self.kind not in SPECULATIVE_KINDS:
            return f"kind must be one of: {', '.join(SPECULATIVE_KINDS)}"
        if not 1 <= self.tokens <= MOST_TOKENS:
            return f"tokens must be from 1 to {MOST_TOKENS}"
        if not 1 <= self.min_ngram <= self.max_ngram <= LONGEST_NGRAM:
            return f"min_ngram and max_ngram must be from 1 to {LONGEST_NGRAM}, in this order"
        return ""


def parse_speculative(text: str) -> Speculative | None:
    """The settings in JSON; None for "". Raises ValueError."""
    if not text:
        return None
    found = msgspec.json.decode(text, type=Speculative)
    if found.wrong:
        raise ValueError(found.wrong)
    return found


def format_speculative(settings: Speculative | None) -> str:
    """The inverse of `parse_speculative`."""
    return "" if settings is None else msgspec.json.encode(settings).decode()
