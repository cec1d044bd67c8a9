"""Continuing an answer whose events have no token ids: another engine repeats it, and the client gets what is new."""

from __future__ import annotations

from pdctl.net.openai.answers import EngineError


class CannotResume(EngineError):
    """Engines of this kind cannot continue the request: its answer ends here."""

    def __init__(self, message: str) -> None:
        super().__init__(502, message, "server_error")


class Retelling:
    """The text that a client has of an answer without token ids, and how much of it a new engine has repeated.

    Such an answer continues by repetition: another engine computes all of it again, and what the client has is left
    out. The client then has exactly the second engine's answer.
    """

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._text = ""
        self._at = 0
        self._field = ""

    def __len__(self) -> int:
        return len(self._text) + sum(map(len, self._parts))

    @property
    def is_repeating(self) -> bool:
        """Whether the engine has not yet repeated all that the client has."""
        return self._at < len(self._text)

    def restart(self) -> None:
        """Another engine computes the answer from its beginning."""
        self._text += "".join(self._parts)
        self._parts.clear()
        self._at, self._field = 0, ""

    def add(self, field: str, text: str) -> str:
        """Take the next text of `field`; returns the part that the client does not have. Raises CannotResume if the
        engine says something else than the client has."""
        said = text if field == self._field else f"\0{field}\0{text}"
        self._field = field
        again = self._text[self._at : self._at + len(said)]
        if not said.startswith(again):
            raise CannotResume("the engine failed, and the next engine gave another answer")
        self._at += len(again)
        new = said[len(again) :]
        self._parts.append(new)
        return new if again else text
