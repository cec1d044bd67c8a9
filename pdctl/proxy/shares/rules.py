"""The settings of API keys."""

from __future__ import annotations

from collections.abc import Sequence

from pdctl.proxy_wire import EVERY_KEY, KeySettings

_DEFAULT = KeySettings(EVERY_KEY)


class KeyRules:
    """The settings of every key. A key without an entry has those of the entry `*`, or the defaults."""

    def __init__(self, entries: Sequence[KeySettings] = ()) -> None:
        self._entries = {entry.name: entry for entry in entries}
        self._others = self._entries.get(EVERY_KEY, _DEFAULT)

    def of(self, key: str) -> KeySettings:
        """The settings of one key."""
        return self._entries.get(key, self._others)
