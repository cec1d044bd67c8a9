"""How fast an engine computes prompts, as measured in its own steps."""

from __future__ import annotations

from pdctl.engine.schedule.batch import Slice

# Before the first prompt was computed. Seconds per token; about a small model on one CPU core.
_UNKNOWN = 1e-3
# Weight of the newest step.
_NEWEST = 0.1


class PrefillSpeed:
    """Seconds per token of a prompt, averaged over steps. Decodes in the same step count as a part of its cost: a
    prompt that waits will share its steps, too."""

    def __init__(self) -> None:
        self.seconds_per_token = _UNKNOWN
        self._is_measured = False

    def note(self, batch: list[Slice], seconds: float) -> None:
        """Take the duration of a step. Steps in which few tokens are of prompts say little and are left out."""
        tokens = sum(piece.count for piece in batch if piece.count > 1)
        if tokens <= len(batch):
            return
        found = seconds / tokens
        before = self.seconds_per_token if self._is_measured else found
        self.seconds_per_token = before + _NEWEST * (found - before)
        self._is_measured = True

    def work(self, tokens: int, _before: int) -> float:
        """Predicted seconds to compute so many tokens of a prompt."""
        return tokens * self.seconds_per_token
