"""Guesses that are mostly right, whatever the model: they are told the answers, and spoil some."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from pdctl.engine import speculation
from pdctl.speculative import Speculative
from tests.engine.parity.families import VOCAB

TOLD = Speculative("told")
_SPOILED = 0.25


class _Told:
    def __init__(self, wholes: list[list[int]], chance: random.Random) -> None:
        self._wholes = wholes
        self._chance = chance

    def draft(self, token_ids: Sequence[int], most: int) -> list[int]:
        end = len(token_ids)
        known = next((whole for whole in self._wholes if whole[:end] == list(token_ids)), [])
        right = known[end : end + most]
        return [self._chance.randrange(VOCAB) if self._chance.random() < _SPOILED else token for token in right]


@contextmanager
def told(wholes: list[list[int]], chance: random.Random) -> Iterator[None]:
    """Within, guesses of kind `told` go on as these sequences do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(speculation._KINDS, TOLD.kind, lambda _: _Told(wholes, chance))
        yield
