"""Prompt lookup (Saxena, 2023): what followed the newest tokens when they last occurred is guessed to follow again.

Answers that repeat their prompt (summaries, code that is edited, answers from documents) are guessed well. The index is
as in LZ77: for each short run of tokens, the places where it ended, newest first.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

# Places that are compared for the longest match, and tokens that one call adds to the index.
_MOST_PLACES = 8
_MOST_ADDED = 4096


class NgramDrafter:
    """Guesses for one sequence. Its newest `shortest` tokens must have occurred before; of several places the one with
    most tokens in common before them is taken, of up to `longest`, and of equal ones the newest."""

    def __init__(self, shortest: int, longest: int) -> None:
        self._shortest = shortest
        self._longest = longest
        # A place is the number of tokens up to the end of a run. By run, the newest place; by place, the one before.
        self._newest: dict[tuple[int, ...], int] = {}
        self._earlier = array("L")

    def draft(self, token_ids: Sequence[int], most: int) -> list[int]:
        """See Drafter.draft."""
        if not self._add(token_ids):
            return []
        at = self._best_place(token_ids)
        found: list[int] = []
        while at and len(found) < most:
            # A run that overlaps its own continuation goes on with what was guessed.
            place = at + len(found)
            found.append(token_ids[place] if place < len(token_ids) else found[place - len(token_ids)])
        return found

    def _add(self, token_ids: Sequence[int]) -> bool:
        """Index the runs that end before the newest token; False if there are too many for one call."""
        size, done = self._shortest, len(self._earlier)
        end = min(len(token_ids), done + _MOST_ADDED)
        for place in range(done, end):
            run = tuple(token_ids[place - size : place]) if place >= size else ()
            self._earlier.append(self._newest.get(run, 0))
            if run:
                self._newest[run] = place
        return end == len(token_ids)

    def _best_place(self, token_ids: Sequence[int]) -> int:
        """The place that is most like the end; 0 if the newest tokens are new."""
        end = len(token_ids)
        place = self._newest.get(tuple(token_ids[-self._shortest :]), 0) if end >= self._shortest else 0
        best, common = 0, 0
        for _ in range(_MOST_PLACES):
            if not place or common == self._longest:
                break
            length = self._common(token_ids, place)
            if length > common:
                best, common = place, length
            place = self._earlier[place]
        return best

    def _common(self, token_ids: Sequence[int], place: int) -> int:
        """The number of equal tokens before a place and before the end."""
        count, end = 0, len(token_ids)
        while count < min(self._longest, place) and token_ids[place - 1 - count] == token_ids[end - 1 - count]:
            count += 1
        return count
