"""Line numbers of the keys in a TOML file.

tomli returns values without positions, so this module scans the text once and records the line of each key. It only
has to be right for files that tomli has accepted.
"""

from __future__ import annotations

import re

Path = tuple[str | int, ...]

_TABLE = re.compile(r"\s*\[([^\[\]]+)\]\s*(?:#.*)?$")
_ARRAY_TABLE = re.compile(r"\s*\[\[([^\[\]]+)\]\]\s*(?:#.*)?$")
_KEY = re.compile(r"""\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=(.*)""")
_STRING = re.compile(r'"(?:\\.|[^"\\])*"|' + r"'[^']*'")


def key_lines(text: str) -> dict[Path, int]:
    """Map each table and key path, such as ("engines", 0, "role"), to its 1-based line."""
    lines: dict[Path, int] = {}
    counts: dict[str, int] = {}
    prefix: Path = ()
    open_value = _OpenValue()
    for number, line in enumerate(text.splitlines(), 1):
        if open_value.continues(line):
            continue
        if found := _ARRAY_TABLE.match(line):
            name = found[1].strip()
            prefix = (name, counts.get(name, 0))
            counts[name] = counts.get(name, 0) + 1
            # The list itself has the line of its first table.
            lines.setdefault((name,), number)
            lines[prefix] = number
        elif found := _TABLE.match(line):
            prefix = _split(found[1])
            lines[prefix] = number
        elif found := _KEY.match(line):
            lines.setdefault((*prefix, *_split(found[1])), number)
            open_value.start(found[2])
    return lines


def _split(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


class _OpenValue:
    """Tracks whether a value continues on the next lines: an open bracket or a triple-quoted string."""

    def __init__(self) -> None:
        self.depth = 0
        self.quote = ""

    def start(self, rest: str) -> None:
        for quote in ('"""', "'''"):
            if rest.strip().startswith(quote) and rest.count(quote) == 1:
                self.quote = quote
                return
        self._brackets(rest)

    def continues(self, line: str) -> bool:
        if self.quote:
            if self.quote in line:
                self.quote = ""
            return True
        if self.depth > 0:
            self._brackets(line)
            return True
        return False

    def _brackets(self, text: str) -> None:
        # Brackets in strings and comments do not count.
        bare = _STRING.sub("", text).split("#")[0]
        self.depth = max(0, self.depth + bare.count("[") + bare.count("{") - bare.count("]") - bare.count("}"))
