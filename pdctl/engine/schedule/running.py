"""The sequences that have blocks and are computed: those that decode, and prompts that are computed in part."""

from __future__ import annotations

from collections.abc import Iterator

from pdctl.engine.schedule.sequence import Sequence


class Running:
    """A sequence that lacks one token decodes, one that lacks more is a partial prompt. Both in order of entry."""

    def __init__(self) -> None:
        self.decoding: dict[str, Sequence] = {}
        self.partial: dict[str, Sequence] = {}

    def __len__(self) -> int:
        return len(self.decoding) + len(self.partial)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.decoding.values()
        yield from self.partial.values()

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.request_id in self.decoding or sequence.request_id in self.partial

    def put(self, sequence: Sequence) -> None:
        """Add a sequence, or move it if it lacks more or fewer tokens than before."""
        mine, other = self.decoding, self.partial
        if sequence.num_missing > 1:
            mine, other = other, mine
        if sequence.request_id not in mine:
            other.pop(sequence.request_id, None)
            mine[sequence.request_id] = sequence

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out."""
        if self.decoding.pop(sequence.request_id, None) is None:
            del self.partial[sequence.request_id]
