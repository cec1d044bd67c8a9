"""What became findable in the prefix cache and what was dropped, in order, until it is told."""

from __future__ import annotations

from pdctl.engine.ipc.messages import KvChange, KvRemoved, KvStored


class KvJournal:
    """Changes of one engine's prefix cache. `tells_tokens`: with the tokens of what is stored. Its length is bounded by
    the blocks of the pool, if it is taken after every step."""

    def __init__(self, tells_tokens: bool) -> None:
        self._tells_tokens = tells_tokens
        self._changes: list[KvChange] = []

    def stored(self, name: bytes, parent: bytes | None, tokens: list[int]) -> None:
        """A block can be found by `name`; it continues the one called `parent`, or begins a chain (None)."""
        last = self._changes[-1] if self._changes else None
        if not isinstance(last, KvStored) or last.names[-1] != parent:
            last = KvStored([], parent, [])
            self._changes.append(last)
        last.names.append(name)
        if self._tells_tokens:
            last.tokens.extend(tokens)

    def removed(self, name: bytes) -> None:
        """The block called `name` cannot be found any more."""
        last = self._changes[-1] if self._changes else None
        if not isinstance(last, KvRemoved):
            last = KvRemoved([])
            self._changes.append(last)
        last.names.append(name)

    def take(self) -> list[KvChange]:
        """The changes since the last call."""
        changes, self._changes = self._changes, []
        return changes
