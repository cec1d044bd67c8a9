"""Reasoning at the beginning of a chat's output, apart from the answer: <think>...</think> or [THINK]...[/THINK]."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from pdctl.engine.front.api.parsers.tool_calls.calls import overlap


@dataclass(frozen=True, slots=True)
class Marks:
    """What begins and ends reasoning. Tokenizers may have these as special tokens."""

    begin: str
    end: str


THINK = Marks("<think>", "</think>")
MISTRAL = Marks("[THINK]", "[/THINK]")


def marks_of_template(template: str) -> Marks | None:
    """The marks that a chat template knows; None if it knows of no reasoning."""
    if MISTRAL.begin in template:
        return MISTRAL
    return THINK if THINK.begin in template or THINK.end in template else None


def is_over(prompt: str, marks: Marks) -> bool:
    """Whether a prompt ends after reasoning, as templates write it to forbid any."""
    return prompt.rstrip().endswith(marks.end)


def is_open(prompt: str, marks: Marks) -> bool:
    """Whether a prompt ends within reasoning, so that the output goes on with it."""
    return prompt.rstrip().endswith(marks.begin)


class _Place(Enum):
    BEFORE = auto()
    INSIDE = auto()
    AFTER = auto()
    ANSWER = auto()


class ReasoningText:
    """Splits growing text into reasoning and the rest. It depends only on the text, so it can be replayed.

    `marks`: None if nothing is reasoning; `begun`: the prompt has begun the reasoning; `enders`: texts that also end
    it, and stay in the rest, because models call tools without ending their reasoning. `first`, `last`: where the
    reasoning begins and ends, in characters of the whole text without the marks; None as long as it does not.
    """

    def __init__(self, marks: Marks | None, begun: bool = False, enders: tuple[str, ...] = ()) -> None:
        self._marks = marks
        self._begun = begun
        self._enders = enders
        self._place = _Place.ANSWER if marks is None else _Place.BEFORE
        self._held = ""
        self._said = False
        self._pushed = 0
        self.first: int | None = None
        self.last: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether more text may be reasoning."""
        return self._place in (_Place.BEFORE, _Place.INSIDE)

    def push(self, text: str) -> tuple[str, str]:
        """Take new text; returns new reasoning and new text after it."""
        if self._place is _Place.ANSWER or self._marks is None:
            return "", text
        self._held += text
        self._pushed += len(text)
        thought = ""
        if self._place is _Place.BEFORE:
            self._enter(self._marks)
        if self._place is _Place.INSIDE:
            thought = self._inside(self._marks)
        if self._place is _Place.AFTER and (rest := self._held.lstrip()):
            self._held, self._place = rest, _Place.ANSWER
        return thought, self._released()

    def flush(self) -> tuple[str, str]:
        """The rest at the end."""
        held, self._held = self._held, ""
        if self._place is _Place.INSIDE or (self._place is _Place.BEFORE and self._begun):
            return (held if self._said else held.lstrip()).rstrip(), ""
        return "", held if self._place is _Place.BEFORE else ""

    def _enter(self, marks: Marks) -> None:
        """Find out whether the output begins with reasoning."""
        rest = self._held.lstrip()
        if rest.startswith(marks.begin):
            self._held, self._place = rest[len(marks.begin) :], _Place.INSIDE
            self.first = self._pushed - len(self._held)
        elif rest and not marks.begin.startswith(rest):
            self._place = _Place.INSIDE if self._begun else _Place.ANSWER
            self.first = 0 if self._begun else None

    def _inside(self, marks: Marks) -> str:
        """New reasoning. White space at its ends is not shown."""
        ends = (marks.end, *self._enders)
        if not self._said:
            self._held = self._held.lstrip()
        found = [(at, end) for end in ends if (at := self._held.find(end)) >= 0]
        if found:
            at, end = min(found)
            thought = self._held[:at].rstrip()
            self.last = self._pushed - len(self._held) + at
            self._held = self._held[at + len(end) if end == marks.end else at :]
            self._place = _Place.AFTER
            return thought
        cut = len(self._held) - max(overlap(self._held, end) for end in ends)
        thought = self._held[:cut].rstrip()
        self._held = self._held[len(thought) :]
        self._said = self._said or bool(thought)
        return thought

    def _released(self) -> str:
        if self._place is not _Place.ANSWER:
            return ""
        text, self._held = self._held, ""
        return text
