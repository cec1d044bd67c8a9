"""What the last word of an incomplete command line can be: an option, a verb, or the value of a parameter. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable


class Parameter(Protocol):
    """The used part of a click parameter. `opts`: its option names; of an argument, its own name."""

    name: str | None
    opts: list[str]
    nargs: int


class Command(Protocol):
    """The used part of a click command."""

    @property
    def params(self) -> Sequence[Parameter]:
        """Options and arguments."""


@runtime_checkable
class Group(Protocol):
    """The used part of a click group."""

    @property
    def commands(self) -> Mapping[str, Command]:
        """Commands by verb."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of the last word.

    `verb`: the verbs before it, such as "bench serve"; `parameter`: the one whose value it is; None for an option's
    name or a verb. `before`: the part of the word that precedes the value, such as "--file=", and `word` the rest.
    `chosen`: values given before it, by parameter.
    """

    verb: str
    command: Command
    parameter: Parameter | None
    word: str
    before: str = ""
    chosen: Mapping[str, str] = field(default_factory=dict)


def slot_of(root: Command, words: Sequence[str]) -> Slot:
    """The place of the last of these words, which may be empty; the program's name is not among them."""
    *earlier, word = words or [""]
    reader = _Reader(root)
    for one in earlier:
        reader.read(one)
    return reader.slot(word)


def options_of(command: Command) -> Iterator[tuple[str, Parameter]]:
    """Every option's names, each with its option. Arguments have no dash."""
    for parameter in command.params:
        for name in (*parameter.opts, *getattr(parameter, "secondary_opts", ())):
            if name.startswith("-"):
                yield name, parameter


def takes_value(parameter: Parameter) -> bool:
    """Whether the next word is the option's value."""
    return not getattr(parameter, "is_flag", False) and not getattr(parameter, "count", False)


class _Reader:
    """Reads the words before the last one."""

    def __init__(self, root: Command) -> None:
        self._command = root
        self._verbs: list[str] = []
        self._begin()
        self._literal = False  # after "--", no word is an option

    def _begin(self) -> None:
        self._chosen: dict[str, str] = {}
        self._waiting: Parameter | None = None
        self._arguments = [found for found in self._command.params if not found.opts[0].startswith("-")]

    def read(self, word: str) -> None:
        if self._waiting is not None:
            self._take(self._waiting, word)
            self._waiting = None
        elif word == "--" and not self._literal:
            self._literal = True
        elif self._is_option(word):
            self._read_option(word)
        elif isinstance(self._command, Group):
            self._enter(word)
        elif self._arguments:
            self._take(self._arguments[0], word)
            if self._arguments[0].nargs != -1:
                self._arguments.pop(0)

    def _enter(self, word: str) -> None:
        assert isinstance(self._command, Group)
        self._verbs.append(word)
        self._command = self._command.commands.get(word, _NOTHING)
        self._begin()

    def _read_option(self, word: str) -> None:
        name, joined, value = word.partition("=")
        option = dict(options_of(self._command)).get(name)
        if option is None or not takes_value(option):
            return
        if joined:
            self._take(option, value)
        else:
            self._waiting = option

    def _take(self, parameter: Parameter, value: str) -> None:
        self._chosen[parameter.name or ""] = value

    def _is_option(self, word: str) -> bool:
        return not self._literal and len(word) > 1 and word.startswith("-")

    def slot(self, word: str) -> Slot:
        verb = " ".join(self._verbs)
        if self._waiting is not None:
            return Slot(verb, self._command, self._waiting, word, chosen=self._chosen)
        if word.startswith("-") and not self._literal:
            name, joined, value = word.partition("=")
            option = dict(options_of(self._command)).get(name) if joined else None
            if option is not None and takes_value(option):
                return Slot(verb, self._command, option, value, f"{name}=", self._chosen)
            return Slot(verb, self._command, None, word, chosen=self._chosen)
        argument = self._arguments[0] if self._arguments and not isinstance(self._command, Group) else None
        return Slot(verb, self._command, argument, word, chosen=self._chosen)


class _Nothing:
    """A verb that does not exist."""

    params: Sequence[Parameter] = ()


_NOTHING = _Nothing()
