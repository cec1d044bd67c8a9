"""The errors a person may see. Each says what, where and (as a hint) what to do."""

from __future__ import annotations

from dataclasses import dataclass


class PdctlError(Exception):
    """Something the user can fix: message, hint, exit code 1."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in a topology file. `line` is 1-based; 0 when the whole file is meant."""

    line: int
    key: str
    message: str
    hint: str | None = None


class ConfigError(PdctlError):
    """Every problem of one topology file, found in one run."""

    def __init__(self, source: str, problems: list[Problem]) -> None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{source}: {count}, nothing was started")
        self.source = source
        self.problems = problems


class NotRunning(PdctlError):
    """A verb needs a running service and there is none."""


class NotAnswering(PdctlError):
    """The service's supervisor lives and does not answer."""


class AlreadyRunning(PdctlError):
    """A second `up` of the same service."""


class ServiceFailed(PdctlError):
    """The service did not become ready; the message carries the reason."""


class Verdict(Exception):
    """A verb has judged, and its exit code says how; `code` means what the verb documents."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code
