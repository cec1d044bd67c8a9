"""A topology file as parsed TOML, with the line number of each key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pdctl.errors import Problem
from pdctl.topology.toml_lines import Path as KeyPath

# A parsed TOML table. Its values are not checked yet.
Table = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Document:
    """A file's values and the line number of each key. `groups`: of a part of it, where each of its [[engines]] is in
    the file; None: it is the whole."""

    data: Table
    lines: dict[KeyPath, int]
    groups: tuple[int, ...] | None = None

    def problem(self, path: KeyPath, message: str, hint: str | None = None) -> Problem:
        """A problem at the line of `path`, or of its nearest parent with a known line."""
        if self.groups is not None and path[0] == "engines" and len(path) > 1 and isinstance(path[1], int):
            path = ("engines", self.groups[path[1]], *path[2:])
        line = next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), 0)
        return Problem(line, dotted(path), message, hint)


def dotted(path: KeyPath) -> str:
    """A path as text, such as `engines[0].role`."""
    words = ""
    for part in path:
        words += f"[{part}]" if isinstance(part, int) else f".{part}"
    return words.lstrip(".")
