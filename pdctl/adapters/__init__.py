"""Engine kinds. A kind is one file here with a `dialect()` (for the proxy) and, where pdctl can start it, a
`LAUNCHER` (for the plan).

The launcher turns a group's settings into a command line; the dialect speaks the kind's HTTP. The two are
loaded when the kind is chosen.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import msgspec

from pdctl.topology.spec import EngineGroup, Topology
from pdctl.wire import EngineAddress

KINDS = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


@dataclass(frozen=True, slots=True)
class Assignment:
    """What the plan decided for one engine replica."""

    name: str
    group: EngineGroup
    port: int
    gpu_uuid: str | None
    rdma: tuple[str, ...]
    model_path: str
    run_dir: Path
    python: str


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start one engine: its command, and the environment it needs on top of ours.

    Paths of its HTTP server: `ready_path` answers 200 when it can be used and as long as it lives; `state_path` tells
    `running` and `tokens_total` as JSON, `generate_path` takes a completion request; "" for what a kind does not have.
    """

    argv: tuple[str, ...]
    env: dict[str, str]
    ready_path: str
    state_path: str = ""
    generate_path: str = ""


class Launcher(Protocol):
    """The planning side of an engine kind."""

    def launch(self, topology: Topology, assignment: Assignment) -> Launch:
        """The command line of one replica. Pure."""
        ...


Fields = dict[str, object]
Choice = dict[str, msgspec.Raw]


@dataclass(slots=True)
class RequestState:
    """What a dialect needs to know of a request at this moment. `emitted`: output tokens the client has.

    `prompt_ids`: the prompt as the engine tokenized it, where it said so; dialects that resume by tokens need it.
    `held`: so many of the last tokens came without text, which is in a later one's, or in none. `again`: tokens that an
    engine is to compute again and that the client may have by their ids. `counts_each`: every event is to carry the
    counts so far.
    """

    path: str
    chat: bool
    fields: Fields
    emitted: list[int] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    held: int = 0
    again: list[int] = field(default_factory=list)
    counts_each: bool = False

    def take_back(self) -> None:
        """Go back to the last token at which the text was complete: those after it are computed again."""
        if self.held:
            cut = len(self.emitted) - self.held
            self.again[:0] = self.emitted[cut:]
            del self.emitted[cut:]
            self.held = 0


class Call(NamedTuple):
    """A POST to an engine."""

    path: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prefill's answer. `hand_over` is the JSON to be given to the decode engine; None when the answer is whole.

    `choice` is the output so far as a stream would carry it, empty where prefill shows none; `token_ids`: its tokens.
    """

    token_ids: list[int]
    choice: Choice
    finish_reason: str | None
    prompt_tokens: int
    hand_over: bytes | None


@dataclass(frozen=True, slots=True)
class Delta:
    """One event of a stream. `choice`: as it goes to clients; `usage`: prompt and completion tokens, if it has any."""

    token_ids: list[int]
    choice: Choice | None
    finish_reason: str | None
    usage: tuple[int, int] | None
    prompt_ids: list[int] | None = None


@dataclass(frozen=True, slots=True)
class Condition:
    """What an engine's probe tells. None for what its kind does not say.

    `seats`: sequences it runs at once; `kv_tokens_free`: room for more KV; `lost_peers`: engines it cannot read from.
    """

    usable: bool
    seats: int | None = None
    kv_tokens_free: int | None = None
    lost_peers: frozenset[str] = frozenset()


class EngineError(Exception):
    """An engine refused or failed a call. `status` is HTTP's; `kv_lost` asks for a new prefill."""

    def __init__(self, status: int, message: str, kind: str, kv_lost: bool = False, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.kv_lost = kv_lost
        self.param = param


class CannotResume(EngineError):
    """A request cannot be continued by engines of this kind: its answer ends where it is."""

    def __init__(self, message: str) -> None:
        super().__init__(502, message, "server_error")


class Dialect(Protocol):
    """The serving side of an engine kind: bodies out, answers in. No I/O.

    `probe_path` is asked for the engine's condition; `keys_by_request_id`: no two calls may have the same x-request-id;
    `own_envelopes`: events come with another id and time than the proxy gives; `resumes_at_text`: what goes on after a
    failure begins with a new text, so that no half character may stand before it.
    """

    probe_path: str
    keys_by_request_id: bool
    own_envelopes: bool
    resumes_at_text: bool

    def known_fields(self, path: str) -> frozenset[str] | None:
        """The fields it takes at a path; None where only the engine itself knows."""
        ...

    def client_ready(self, state: RequestState) -> bool:
        """Whether a stream's events may go to clients as they are, but for token ids."""
        ...

    def prefill_call(self, state: RequestState, decode: EngineAddress) -> Call:
        """Ask for one token and the KV to be held; `decode` is the engine that will read it. Raises CannotResume."""
        ...

    def decode_call(self, state: RequestState, hand_over: bytes | None, stream: bool) -> Call:
        """Ask for the rest, from `hand_over` where given. Raises CannotResume."""
        ...

    def ending(self, state: RequestState) -> Choice | None:
        """The last choice where the client has all the tokens and only the end was lost; None to ask an engine."""
        ...

    def parse_prefill(self, status: int, body: bytes, state: RequestState) -> Prefilled:
        """Raises EngineError for anything but a usable answer."""
        ...

    def parse_event(self, data: bytes, state: RequestState) -> Delta:
        """One server-sent event's data. Raises EngineError for an error event."""
        ...

    def parse_whole(self, body: bytes) -> tuple[int, int]:
        """Prompt and completion tokens of an answer in one piece. Raises EngineError when it is none."""
        ...

    def parse_condition(self, status: int, body: bytes) -> Condition:
        """The answer at `probe_path`."""
        ...

    def give_up_call(self, attempt: str) -> Call | None:
        """What ends whatever a prefill call, sent under this name, left or may still leave; None for nothing."""
        ...

    def release_call(self, hand_over: bytes) -> Call | None:
        """What frees a hand-over nobody will read; None where only time does."""
        ...


def can_launch(kind: str) -> bool:
    """Whether pdctl starts engines of this kind itself."""
    return hasattr(importlib.import_module(f"pdctl.adapters.{kind}"), "LAUNCHER")


def launcher(kind: str) -> Launcher:
    """The launcher of a known kind that can be started."""
    return cast(Launcher, importlib.import_module(f"pdctl.adapters.{kind}").LAUNCHER)


def dialect(kind: str) -> Dialect:
    """The dialect of a known kind."""
    return cast(Dialect, importlib.import_module(f"pdctl.adapters.{kind}").dialect())


def stream_fields(state: RequestState) -> Fields:
    """Fields that every stream is requested with: token ids, which a failover needs, and counts."""
    options = {"include_usage": True, **({"continuous_usage_stats": True} if state.counts_each else {})}
    return {"return_token_ids": True, "stream_options": options}


def without(fields: Fields, *names: str) -> Fields:
    """A request's fields but these."""
    return {name: value for name, value in fields.items() if name not in names}


def shown(choice: Choice, *hidden: str) -> Choice:
    """A choice as clients see it: without its index, which the proxy gives, and what they did not ask for."""
    return {name: value for name, value in choice.items() if name not in ("index", *hidden)}
