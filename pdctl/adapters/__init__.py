"""Engine kinds. A kind is one file here with a `LAUNCHER` (for the plan) and a `dialect()` (for the proxy).

The launcher turns a group's settings into a command line; the dialect speaks the kind's HTTP. The two are
loaded when the kind is chosen.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from pdctl.topology import EngineGroup, Topology
from pdctl.wire import EngineAddress, HandOver

KINDS = ("builtin",)


@dataclass(frozen=True, slots=True)
class Assignment:
    """What the plan decided for one engine replica."""

    name: str
    group: EngineGroup
    port: int
    gpu_uuid: str | None
    model_path: str
    run_dir: Path
    python: str


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start one engine: its command, the environment it needs on top of ours, its readiness path."""

    argv: tuple[str, ...]
    env: dict[str, str]
    ready_path: str


class Launcher(Protocol):
    """The planning side of an engine kind."""

    def launch(self, topology: Topology, assignment: Assignment) -> Launch:
        """The command line of one replica. Pure."""
        ...


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prefill's answer. `hand_over` is None when the request ended with this token."""

    token_ids: list[int]
    text: str
    finish_reason: str | None
    prompt_tokens: int
    hand_over: HandOver | None


@dataclass(frozen=True, slots=True)
class Delta:
    """One event of a decode stream. `usage`: prompt and completion tokens, with the last event."""

    token_ids: list[int]
    text: str
    finish_reason: str | None
    usage: tuple[int, int] | None


class EngineError(Exception):
    """An engine refused or failed a call. `status` is HTTP's; `kv_lost` asks for a new prefill."""

    def __init__(self, status: int, message: str, kind: str, kv_lost: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.kv_lost = kv_lost


class Dialect(Protocol):
    """The serving side of an engine kind: bodies out, answers in. No I/O."""

    def prefill_body(self, fields: dict[str, object], resume: list[int], decode: EngineAddress) -> bytes:
        """Ask for one token and the KV to be held; `decode` is the engine that will read it."""
        ...

    def decode_body(self, fields: dict[str, object], resume: list[int], hand_over: HandOver | None) -> bytes:
        """Ask for the rest as a stream, from `hand_over` where given."""
        ...

    def parse_prefill(self, status: int, body: bytes, chat: bool) -> Prefilled:
        """Raises EngineError for anything but a usable answer."""
        ...

    def parse_event(self, data: bytes, chat: bool) -> Delta:
        """One server-sent event's data. Raises EngineError for an error event."""
        ...

    def give_up_call(self, attempt: str) -> tuple[str, bytes]:
        """Path and body that end whatever a prefill call, sent under this name, left or may still leave."""
        ...

    def release_call(self, hand_over: HandOver) -> tuple[str, bytes]:
        """Path and body that free a hand-over nobody will read."""
        ...


def launcher(kind: str) -> Launcher:
    """The launcher of a known kind."""
    return cast(Launcher, importlib.import_module(f"pdctl.adapters.{kind}").LAUNCHER)


def dialect(kind: str) -> Dialect:
    """The dialect of a known kind."""
    return cast(Dialect, importlib.import_module(f"pdctl.adapters.{kind}").dialect())
