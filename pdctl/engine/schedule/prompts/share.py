"""The part of an engine's work on prompts that goes to those that have waited too long, whatever the policy says.

A policy that put them first altogether would become first-come as soon as every prompt waits that long, which is when
the order matters most.
"""

from __future__ import annotations

# A prompt that has waited so long may be computed out of order. Seconds.
LONGEST_WAIT_S = 30.0
# Of the tokens of prompts, while some have waited too long.
_PART = 0.125


class OverdueShare:
    """A balance in tokens. It is paid by prompts that go by the policy, and spent by those that go out of turn."""

    def __init__(self) -> None:
        self._balance = 0.0

    @property
    def is_due(self) -> bool:
        """Whether a prompt that has waited too long may go first now."""
        return self._balance >= 0

    def spend(self, tokens: int, out_of_turn: bool) -> None:
        """Note tokens that a step computes. Nothing is saved up: the share is a part of the work that others get
        meanwhile."""
        change = (_PART - 1) * tokens if out_of_turn else _PART * tokens
        self._balance = min(0.0, self._balance + change)
