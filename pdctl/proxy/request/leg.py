"""One leg of a client's request: its input, its state, and what all legs of a proxy share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from hashlib import blake2s
from typing import NamedTuple

from pdctl.adapters import RequestState
from pdctl.net.prefixes.beginnings import Beginning, to_header
from pdctl.proxy.answers.sinks import Sink
from pdctl.proxy.engines.breaker import RetryBudget
from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.engines.kv_room import Share
from pdctl.proxy.engines.pool import EnginePool
from pdctl.proxy.engines.releases import Releases
from pdctl.proxy.engines.routing import RoutingPolicy
from pdctl.proxy.request.failover import FailoverPolicy
from pdctl.proxy.request.quarantine import Quarantine, Suspicion
from pdctl.proxy.request.unfinished import Unfinished
from pdctl.proxy.takeover.notes import Progress
from pdctl.proxy.telemetry.metrics import Metrics
from pdctl.proxy.telemetry.spans import NO_TRACE, RequestTrace
from pdctl.proxy.telemetry.timing import Timing
from pdctl.wire import BEGINNING_HEADER, ORDER_HEADER, SLO_HEADER, TENANT_HEADER

# An answer that is not streamed and has at most this many tokens is requested in one piece: computing it again after a
# failure is cheaper than relaying it token by token.
_WHOLE_TOKENS = 128


@dataclass(slots=True)
class Shared:
    """State and settings that all requests of a proxy share."""

    pool: EnginePool
    policy: RoutingPolicy
    metrics: Metrics
    releases: Releases
    quarantine: Quarantine
    ttft_s: float
    tpot_s: float
    lease_s: float = 30.0
    failover: FailoverPolicy = field(default_factory=FailoverPolicy)
    budget: RetryBudget = field(default_factory=RetryBudget)
    unfinished: Unfinished = field(default_factory=Unfinished)
    request_number: int = 0


class Move(NamedTuple):
    """A stream goes on at another engine: `source` has its KV; `target`: the engine that was to read it."""

    source: Engine
    hand_over: bytes
    target: str


class Leg:
    """One choice of one prompt. `state.emitted`: ids of output tokens that the client has, or will get with a whole
    answer.

    `name`: the request id for engines; `headers`: header lines for engines; `size`: of the prompt, in bytes of the
    request; `body`: the client's request, which identifies it in quarantine; `beginning`: names of the prompt's first
    pieces, None if nobody asks for them; `whole`: the body of an answer in one piece, as sent to the client;
    `failures`: calls that failed; `share`: the room of its KV at a prefill engine; `move`: where its stream goes on;
    `trace`: of its request.
    """

    # Class attributes: most requests never set these, and then they need no memory per request.
    prompt_tokens = 0
    cached_tokens = 0
    reasoning_tokens = 0
    completion_tokens = 0
    whole: bytes | None = None
    failures = 0
    finished = False
    share: Share | None = None
    move: Move | None = None
    trace: RequestTrace = NO_TRACE
    # Called when its prompt is computed.
    on_prefilled: Callable[[], None] | None = None
    # Another proxy has sent a part of it.
    was_resumed = False
    # The time of the first token of an answer in one piece is unknown. Where it matters, the engine must stream.
    must_stream = False

    def __init__(
        self,
        shared: Shared,
        state: RequestState,
        sink: Sink,
        name: str,
        headers: bytes,
        size: float,
        max_tokens: int | None,
        body: bytes,
        beginning: Beginning | None,
        timing: Timing,
    ) -> None:
        self.shared = shared
        self.state = state
        self.sink = sink
        self.name = name
        self.headers = headers
        self.size = size
        self.max_tokens = max_tokens
        self.body = body
        self.beginning = beginning
        self.timing = timing
        self.suspicion = Suspicion(shared.quarantine)

    def resume(self, progress: Progress) -> None:
        """Go on after what another proxy has sent."""
        self.state.emitted += progress.token_ids
        self.prompt_tokens, self.cached_tokens = progress.prompt_tokens, progress.cached_tokens
        self.finished, self.was_resumed = progress.finished, progress.begun

    @property
    def pieces(self) -> tuple[int, ...]:
        """The names of the prompt's first pieces, as far as anybody asks for them."""
        return self.beginning.pieces if self.beginning is not None else ()

    @cached_property
    def beginning_line(self) -> bytes:
        """The names of the prompt's first pieces, as a header line: each of its calls carries it."""
        return b"%b: %b\r\n" % (BEGINNING_HEADER.encode(), to_header(self.beginning)) if self.beginning else b""

    @property
    def in_one_piece(self) -> bool:
        """Whether the answer is requested in one piece: the client does not stream it, and it is short."""
        short = self.max_tokens is not None and self.max_tokens <= _WHOLE_TOKENS
        return short and self.sink.takes_whole and not self.state.emitted and not self.must_stream

    @property
    def has_one_token_left(self) -> bool:
        """Whether one prefill completes the answer."""
        return self.max_tokens is not None and self.max_tokens - len(self.state.emitted) <= 1


@lru_cache(maxsize=1024)
def tenant_line(key: str) -> bytes:
    """A hash of the key: engines can group requests by tenant, but do not learn the key's name."""
    return f"{TENANT_HEADER}: {blake2s(key.encode(), digest_size=8).hexdigest()}\r\n".encode()


@lru_cache(maxsize=4)
def slo_line(ttft_s: float, tpot_s: float) -> bytes:
    """The service's targets, as a header line for engines."""
    return f"{SLO_HEADER}: {ttft_s * 1000:g} {tpot_s * 1000:g}\r\n".encode()


@lru_cache(maxsize=512)
def order_line(order: int) -> bytes:
    """The order among requests of several keys, as a header line for engines."""
    return f"{ORDER_HEADER}: {order}\r\n".encode()
