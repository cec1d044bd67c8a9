"""Models for trying pdctl out and for its tests, made on this machine. Never shipped."""

from __future__ import annotations

from collections.abc import Callable

# Says how far a conversion is: a word and a fraction from 0 to 1.
Progress = Callable[[str, float], None]


class CannotPrepare(Exception):
    """The model cannot be made ready, with a sentence and a hint."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
