"""Errors shown to users. Each says what is wrong, where, and (as a hint) what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

Failure = TypeVar("Failure", bound=Exception)


def first_of(failures: ExceptionGroup[Failure]) -> Failure:
    """The first failure of a group. Task groups in task groups wrap a failure several times."""
    first = failures.exceptions[0]
    return first_of(first) if isinstance(first, ExceptionGroup) else first


class PdctlError(Exception):
    """An error that the user can fix: message, hint, exit code 1."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem in a topology file. `line` is 1-based; 0 for the file as a whole."""

    line: int
    key: str
    message: str
    hint: str | None = None


class ConfigError(PdctlError):
    """All problems of one topology file."""

    def __init__(self, source: str, problems: list[Problem]) -> None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{source}: {count}, nothing was started")
        self.source = source
        self.problems = problems


class NotRunning(PdctlError):
    """A verb needs a running service, but there is none."""


class NotAnswering(PdctlError):
    """The service's supervisor is alive but does not answer."""


class AlreadyRunning(PdctlError):
    """`up` was called for a service that is already running."""


class PortsTaken(PdctlError):
    """Another service has claimed a planned port. A new plan has other ports."""


class ServiceFailed(PdctlError):
    """The service did not become ready; the message gives the reason."""


class Verdict(Exception):
    """The result of a verb as an exit code; the verb documents the meaning of `code`."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code
