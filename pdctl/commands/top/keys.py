"""From the bytes that a terminal sends to names of keys. Pure."""

from __future__ import annotations

_ESCAPE = "\x1b"
_NAMED = {
    "\x03": "ctrl-c", "\x04": "ctrl-d", "\x0c": "ctrl-l", "\x1a": "ctrl-z", "\r": "enter", "\n": "enter", "\t": "tab",
    "\x7f": "backspace", "\x08": "backspace",
}  # fmt: skip
_FINAL = {"A": "up", "B": "down", "C": "right", "D": "left", "H": "home", "F": "end"}
_NUMBERED = {"1": "home", "4": "end", "5": "page-up", "6": "page-down", "7": "home", "8": "end"}
# A sequence that is longer is none of a key.
_LONGEST = 16


class KeyReader:
    """Bytes in, names of keys out: a character itself, or such as `up`, `page-down`, `ctrl-c`. Sequences that no key
    here has are left out. A sequence may come in parts; a lone escape is a key once nothing follows (`quiet`)."""

    def __init__(self) -> None:
        self._rest = ""

    def feed(self, data: bytes) -> list[str]:
        """The keys that are complete with these bytes."""
        text, self._rest = self._rest + data.decode(errors="ignore"), ""
        keys: list[str] = []
        while text:
            if text[0] != _ESCAPE:
                keys += _plain(text[0])
                text = text[1:]
                continue
            size = _sequence(text)
            if size is None:
                self._rest = text
                break
            keys += _key(text[:size])
            text = text[size:]
        return keys

    def quiet(self) -> list[str]:
        """The key that waits for bytes that do not come: the escape key."""
        had, self._rest = self._rest, ""
        return ["escape"] if had == _ESCAPE else []


def _plain(character: str) -> list[str]:
    if character in _NAMED:
        return [_NAMED[character]]
    return [character] if character.isprintable() else []


def _sequence(text: str) -> int | None:
    """Length of the sequence at the begin; None if it is not complete. `text` begins with an escape."""
    if len(text) == 1:
        return None
    if text[1] == _ESCAPE:
        return 1
    if text[1] == "O":
        return 3 if len(text) > 2 else None
    if text[1] != "[":
        return 2
    for place, character in enumerate(text[2:_LONGEST], 2):
        if "@" <= character <= "~":
            return place + 1
    return None if len(text) < _LONGEST else _LONGEST


def _key(sequence: str) -> list[str]:
    if sequence == _ESCAPE:
        return ["escape"]
    if sequence[1] not in "[O":
        return []
    number = sequence[2:-1].partition(";")[0]
    name = _NUMBERED.get(number) if sequence[-1] == "~" else _FINAL.get(sequence[-1])
    return [name] if name else []
