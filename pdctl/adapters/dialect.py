"""The dialect of an engine kind: builds the proxy's requests and parses the answers. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol

from pdctl.adapters.retelling import CannotResume, Retelling
from pdctl.latency import Work
from pdctl.net.openai.answers import Choice, EngineError
from pdctl.net.openai.api import Counts
from pdctl.proxy_wire import EngineAddress

__all__ = [
    "ALL_ROLES", "UNKNOWN_TOKEN", "Attempt", "Call", "CannotResume", "Condition", "Delta", "Dialect", "Fields",
    "HandShake", "Pairing", "Prefilled", "RequestState", "Retelling", "RoomProbe", "Tokenizer", "stream_fields",
    "without",
]  # fmt: skip

Fields = dict[str, object]

# The id of an output token that the engine did not report. Clients never see it, and no request resumes after it.
UNKNOWN_TOKEN = -1


class HandShake(Enum):
    """The order in which the proxy calls a pair of engines for one request.

    SEQUENTIAL: prefill first; decode gets the hand-over from prefill's answer, and frees the KV at prefill itself.
    OWNED: the same, but the proxy frees the KV at prefill once decode has it.
    CONCURRENT: both at once, with what they need to find each other; only decode's answer is used.
    """

    SEQUENTIAL = "sequential"
    OWNED = "owned"
    CONCURRENT = "concurrent"


class Attempt(NamedTuple):
    """One try of a request. `name` is unique. Both engines are the same if one engine computes the request alone.

    The plan chooses the addresses' `ports`; an attached engine has none.
    """

    name: str
    prefill: EngineAddress
    decode: EngineAddress


@dataclass(slots=True)
class RequestState:
    """The state of a request that a dialect needs. `emitted`: output tokens that the client has.

    `prompt_ids`: the prompt as the engine tokenized it, if the engine reported that; dialects that resume by tokens
    need it. `held`: how many of the last tokens came without text; their text comes with a later token, or never.
    `again`: tokens that an engine computes again, and whose ids the client may already have. `counts_each`: every event
    carries the token counts so far. `reasoned`: a part of the answer was reasoning, apart from its content. `model`:
    the service's, for kinds that need it in every request. `told`: the text that the client has, if the engine's events
    have no token ids.
    """

    path: str
    chat: bool
    fields: Fields
    emitted: list[int] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    held: int = 0
    again: list[int] = field(default_factory=list)
    counts_each: bool = False
    reasoned: bool = False
    model: str = ""
    told: Retelling | None = None

    @property
    def sent(self) -> int:
        """How much of the answer the client has: in tokens, or in characters if the engine tells no token ids."""
        return len(self.emitted) + (len(self.told) if self.told is not None else 0)

    def take_back(self) -> None:
        """Drop the tokens after the last complete text. An engine computes them again."""
        if self.held:
            cut = len(self.emitted) - self.held
            self.again[:0] = self.emitted[cut:]
            del self.emitted[cut:]
            self.held = 0

    def start_over(self) -> None:
        """The client has nothing of the answer: another engine computes all of it."""
        self.emitted.clear()
        self.again.clear()
        self.held = 0
        self.told = None


class Call(NamedTuple):
    """A POST to an engine. `headers`: complete header lines beside those of every call."""

    path: str
    body: bytes
    headers: bytes = b""


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prefill's answer. `hand_over` is the JSON for the decode engine; None if the answer is complete.

    `choice`: the output so far in the format of a stream, empty if prefill returns none; `token_ids`: its tokens.
    `left`: a hand-over that nobody needs, because the answer is complete; the proxy releases it. `cached_tokens`: those
    of the prompt whose KV was there already.
    """

    token_ids: list[int]
    choice: Choice
    finish_reason: str | None
    prompt_tokens: int
    hand_over: bytes | None
    left: bytes | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """One event of a stream. `choice`: as sent to clients; `usage`: the token counts, if the event has them.
    `hand_over`: the stream ends here and goes on at another engine, with this."""

    token_ids: list[int]
    choice: Choice | None
    finish_reason: str | None
    usage: Counts | None
    prompt_ids: list[int] | None = None
    hand_over: bytes | None = None


@dataclass(frozen=True, slots=True)
class Condition:
    """The result of an engine's probe. None for values that its kind does not report.

    `seats`: sequences that it runs concurrently; `kv_tokens_free`: room for more KV; `lost_peers`: engines that it
    cannot read from; `work`: what predicts its steps.
    """

    usable: bool
    seats: int | None = None
    kv_tokens_free: int | None = None
    lost_peers: frozenset[str] = frozenset()
    work: Work | None = None


class RoomProbe(NamedTuple):
    """Where a GET returns how many tokens of KV an engine has, and how its answer is read; None for an answer without
    it."""

    path: str
    tokens: Callable[[bytes], int | None]


ALL_ROLES = frozenset({"prefill", "decode", "hybrid"})


@dataclass(frozen=True, slots=True)
class Pairing:
    """What the proxy must respect when it uses engines of a kind. The defaults are no limits.

    `alone`: the roles in which one engine can compute a whole answer. `one_token_alone`: a prefill engine answers a
    request for one token alone. `hybrids_pair`: hybrid engines can be part of a pair. `prefill_must_finish`: closing a
    running prefill call harms the engine, so the call goes on in the background. `waits_forever`: a decode engine waits
    for a prefill engine that is gone, so the proxy ends such calls. `room`: an engine does not protect the KV that it
    keeps for others, so the proxy limits the prompts that it has there.
    """

    alone: frozenset[str] = ALL_ROLES
    one_token_alone: bool = True
    hybrids_pair: bool = True
    prefill_must_finish: bool = False
    waits_forever: bool = False
    room: RoomProbe | None = None


class Tokenizer(NamedTuple):
    """How an engine is asked for the tokens of a request's prompt, and how its answer is read, which raises
    EngineError."""

    call: Callable[[RequestState], Call]
    tokens: Callable[[bytes], list[int]]


class Dialect(Protocol):
    """The dialect of an engine kind.

    `probe_path`: where a GET returns the engine's condition; `keys_by_request_id`: no two calls may have the same
    x-request-id; `own_envelopes`: events have the engine's id and time, not the proxy's; `resumes_at_text`: after a
    failure, the continuation starts a new text, so the client's text must not end within a character; `deterministic`:
    the same request always has the same answer, independent of other requests in the engine; `verifies_leases`: an
    engine never decodes KV that it read after its lease ended. For other kinds the proxy discards an answer that begins
    too late. `tells_pieces`: it takes the names of a prompt's pieces (net.beginnings), and tells of which it has KV.
    `tokenizer`: it says which tokens a prompt has; None if it cannot be asked.
    """

    hand_shake: HandShake
    probe_path: str
    keys_by_request_id: bool
    own_envelopes: bool
    resumes_at_text: bool
    deterministic: bool
    pairing: Pairing
    verifies_leases: bool
    tells_pieces: bool
    tokenizer: Tokenizer | None

    def known_fields(self, path: str) -> frozenset[str] | None:
        """The request fields that the engine accepts at a path; None if only the engine knows them."""
        ...

    def client_ready(self, state: RequestState) -> bool:
        """Whether the proxy may forward a stream's events unchanged, except for removing token ids."""
        ...

    def cannot_resume(self, state: RequestState) -> str:
        """Why a request that has tokens cannot continue exactly, as a message for the client; "" if it can."""
        ...

    def prefill_call(self, state: RequestState, attempt: Attempt) -> Call:
        """Compute the prompt and keep its KV for `attempt.decode`. Only for requests that can resume."""
        ...

    def decode_call(self, state: RequestState, attempt: Attempt, hand_over: bytes | None, stream: bool) -> Call:
        """Compute the rest. Only for requests that can resume.

        The KV comes from `hand_over`, if given. Without one it comes from the prefill call of the same attempt if the
        hand-shake is concurrent and the engines differ; otherwise the engine computes the prompt itself.
        """
        ...

    def ending(self, state: RequestState) -> Choice | None:
        """The final choice if the client has all tokens and only the end was lost; None if an engine must send it."""
        ...

    def parse_error(self, status: int, body: bytes) -> EngineError:
        """Parse an answer to either call with a status other than 200."""
        ...

    def parse_prefill(self, body: bytes, state: RequestState) -> Prefilled:
        """Parse a prefill's answer. Raises EngineError if it is not usable."""
        ...

    def parse_event(self, data: bytes, state: RequestState) -> Delta:
        """Parse the data of one server-sent event. Raises EngineError for an error event."""
        ...

    def parse_whole(self, body: bytes) -> Counts:
        """Prompt and completion tokens of an answer in one piece. Raises EngineError if it is not such an answer."""
        ...

    def parse_condition(self, status: int, body: bytes) -> Condition:
        """Parse the answer at `probe_path`."""
        ...

    def give_up_call(self, attempt: str) -> Call | None:
        """Release everything that a prefill call of this attempt holds or may still hold; None if the kind cannot."""
        ...

    def give_up_decode_call(self, attempt: str) -> Call | None:
        """Abort a decode call of this attempt; None if the end of its connection is enough."""
        ...

    def move_call(self, attempt: str, to: EngineAddress) -> Call | None:
        """Have the stream of an attempt end with a hand-over for `to`; None if the kind cannot."""
        ...

    def release_call(self, hand_over: bytes) -> Call | None:
        """Release a hand-over at prefill; None if only a timeout can, or if the engine did not say how to name it."""
        ...


def stream_fields(state: RequestState) -> Fields:
    """Fields that the proxy adds to every streamed request: token ids, which failover needs, and token counts."""
    options = {"include_usage": True, **({"continuous_usage_stats": True} if state.counts_each else {})}
    return {"return_token_ids": True, "stream_options": options}


def without(fields: Fields, *names: str) -> Fields:
    """A request's fields except these."""
    return {name: value for name, value in fields.items() if name not in names}
