"""Sample models for trying pdctl and for its tests. They are made on this machine and never shipped."""

from __future__ import annotations

from collections.abc import Callable

# Reports the progress of a conversion: a description and a fraction from 0 to 1.
Progress = Callable[[str, float], None]


class CannotPrepare(Exception):
    """The model cannot be prepared; with a message and a hint."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
