"""Read an engine's event stream: ordinary events are forwarded as bytes, others are parsed one by one.

A read usually has events of a running stream: no end, no error, token ids in each. They are forwarded in one write
without being parsed, with token ids removed if the client did not request them; the ids are decoded later, many at a
time. Whether a read is ordinary is decided by counting: each event must have one `"finish_reason":null` and one
`"token_ids":[`. Quotes inside a JSON string are escaped, so no text can imitate these. Anything else, such as JSON with
spaces, takes the slow path."""

from __future__ import annotations

import math
import re
import time
from bisect import bisect_left
from collections.abc import Callable

from pdctl.adapters import UNKNOWN_TOKEN, CannotResume, Choice, EngineError, RequestState
from pdctl.net.http_client import Exchange
from pdctl.proxy.answers.sinks import Sink
from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.telemetry.metrics import Metrics
from pdctl.proxy.telemetry.timing import Timing

_END = b"\n\n"
_CHOICES = b'"choices":['
_GOES_ON = b'"finish_reason":null'
_IDS = b'"token_ids":['
_COMMA_IDS = b"," + _IDS
_NEWLINE = 0x0A
_NO_PROMPT_IDS = b',"prompt_token_ids":null'
_PROMPT_LIST = b'"prompt_token_ids":['
_IDS_OF = re.compile(rb'"token_ids":\[([\d,]*)\]')
_HIDDEN = re.compile(rb',"(?:prompt_)?token_ids":(?:null|\[[\d,]*\])')
# Text cannot imitate this: its quotes are escaped.
_REASONING = re.compile(rb'"reasoning(?:_content)?":"')
# Reads whose token ids are kept as text before they are decoded.
_KEPT = 32
# Events at the end of a read that may not be ordinary: the last token, the counts, [DONE].
_TAIL = 3
# Limit of one event, bytes: an engine that sends more without an end does not speak this protocol.
_MAX_EVENT = 16 * 2**20


class EventReader:
    """Reads one stream to its end. `seconds`: from its first tokens to its last; `completion_tokens`: by the engine's
    own count, if it tells one; `hand_over`: with this it goes on elsewhere; `valid_until`: see calls.decode."""

    def __init__(
        self,
        engine: Engine,
        state: RequestState,
        sink: Sink,
        timing: Timing,
        metrics: Metrics,
        on_first_token: Callable[[], None] | None = None,
        valid_until: float = math.inf,
    ) -> None:
        self.tokens = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.reasoning_tokens = 0
        self.completion_tokens = 0
        self.finished = False
        self.hand_over: bytes | None = None
        self._engine = engine
        self._state = state
        self._sink = sink
        self._timing = timing
        self._on_first_token = on_first_token
        self._valid_until = valid_until
        # For forwarded events: their token ids as text, and the events.
        self._ids: list[bytes] = []
        self._reads: list[bytes] = []
        self._tail = b""
        self._rest = b""
        # The beginning of events up to the choice, if the engine's differs from the client's.
        self._ours = sink.event_head if engine.dialect.own_envelopes else b""
        self._theirs = b""
        # Token ids that the client already has are removed event by event.
        self._passes = sink.passes and engine.dialect.client_ready(state) and not state.again
        self._hides = sink.hides_token_ids
        self._first_at = self._last_at = 0.0
        self._part_now = sink.part_now
        self._gaps = metrics.gaps

    @property
    def seconds(self) -> float:
        """From the first tokens to the last."""
        return self._last_at - self._first_at

    async def run(self, exchange: Exchange) -> None:
        """Forward everything. Raises Unreachable, EngineError."""
        if self._passes:
            exchange.tap(self._take)
        while (data := await exchange.read()) is not None:
            if self._rest:
                data = self._rest + data
            end = data.rfind(_END) + 2
            if end < 2:
                self._rest = self._incomplete(data)
                continue
            self._rest = data[end:]
            # The prompt's ids come once, with the first token, and a failover may need them.
            ordinary = self._ordinary(data, end) if self._passes and _PROMPT_LIST not in data else 0
            if ordinary:
                data, tail = data[:ordinary], data[ordinary:end]
                ids = _ids_in(data)
                await self._sink.pass_on(self._noted(data, ids), b",".join(ids))
            else:
                tail = data[:end]
            if tail:
                for event in tail[:-2].split(_END):
                    await self._event(event)

    def _take(self, data: bytes) -> float:
        """Forward a read of complete, ordinary events at once, if the client takes it; 0.0 if not.

        Nearly every token takes this path. It needs a few microseconds, so it is one function.
        """
        # These are the cheapest methods of bytes: they search from the end, or for one byte.
        head, found, rest = data.rpartition(_COMMA_IDS)
        ids, _, tail = rest.partition(b"]")
        if not found or _NEWLINE in head or head.rfind(_GOES_ON) < 0 or (tail != self._tail and not self._ends(tail)):
            return self._take_several(data)
        if not self._last_at or self._rest:
            return 0.0
        if self._ours and not (self._theirs and data.startswith(self._theirs)):
            return 0.0
        shown = data
        if self._hides:
            shown = head + tail
            if shown.rfind(_NO_PROMPT_IDS) >= 0:
                shown = shown.replace(_NO_PROMPT_IDS, b"")
        if self._ours:
            shown = self._ours + shown[len(self._theirs) :]
        now = time.monotonic()
        if not self._part_now(shown, ids):
            return 0.0
        # There is no await here, so nothing can happen between sending and keeping.
        self._ids.append(ids)
        self._reads.append(data)
        gap = now - self._last_at
        self._gaps.counts[bisect_left(self._gaps.bounds, gap)] += 1
        self._gaps.total += gap
        self._last_at = self._engine.heard_at = now
        self.tokens += 1
        if len(self._ids) >= _KEPT:
            self.settle()
        return now

    def _ends(self, tail: bytes) -> bool:
        """Whether `tail` is the end of one event, with nothing after it. It is nearly always the same in a stream."""
        # A tail of one byte has no end either: exclude -1.
        if not tail.endswith(_END) or tail.find(_END) != len(tail) - 2:
            return False
        self._tail = tail
        return True

    def _take_several(self, data: bytes) -> float:
        """Like `_take`, for a read of several events, or of a part of one."""
        count = data.count(_END)
        if not self._last_at or self._rest or not data.endswith(_END) or self._ordinary(data, len(data)) < len(data):
            return 0.0
        ids = _ids_in(data)
        if not self._part_now(self._shown(data), b",".join(ids)):
            return 0.0
        self._keep(data, ids)
        self._arrived(count)
        return self._last_at

    def _keep(self, data: bytes, ids: list[bytes]) -> None:
        """Keep the token ids of ordinary events for later."""
        self._ids += ids
        self._reads.append(data)
        if len(self._ids) >= _KEPT:
            self.settle()

    def _shown(self, data: bytes) -> bytes:
        """Ordinary events in the client's form."""
        if self._hides:
            data = _HIDDEN.sub(b"", data)
        # Inside a JSON string a quote is escaped: no text can imitate the beginning of an event.
        return data.replace(self._theirs, self._ours) if self._ours else data

    def settle(self) -> None:
        """Decode the token ids of forwarded events."""
        if self._ids:
            kept, self._ids = b",".join(filter(None, self._ids)), []
            if self.tokens > 1:
                self._engine.paced((self._last_at - self._first_at) / (self.tokens - 1))
            if kept:
                self._state.emitted.extend(map(int, kept.split(b",")))
            reads, self._reads = self._reads, []
            self._state.reasoned = self._state.reasoned or any(map(_has_reasoning, reads))
            held, said = _held(reads)
            self._state.held = held if said else self._state.held + held

    def _incomplete(self, data: bytes) -> bytes:
        if len(data) > _MAX_EVENT:
            raise EngineError(
                502, f"{self._engine.name} sent {len(data)} bytes without the end of an event", "bad_upstream"
            )
        return data

    def _ordinary(self, data: bytes, end: int) -> int:
        """The position in `data` (complete events up to `end`) up to which all events are ordinary."""
        for _ in range(_TAIL + 1):
            count = data.count(_END, 0, end)
            begun = not self._ours or (self._theirs != b"" and data.count(self._theirs, 0, end) == count)
            if begun and data.count(_GOES_ON, 0, end) == count and data.count(_IDS, 0, end) == count:
                return end
            end = data.rfind(_END, 0, end - 2) + 2
            if end < 2:
                return 0
        return 0

    def _noted(self, data: bytes, ids: list[bytes]) -> bytes:
        """Ordinary events in the client's form; their tokens are recorded."""
        self._arrived(data.count(_END))
        # Record before sending: a token that may have reached the client is never sent again.
        self._keep(data, ids)
        return self._shown(data)

    async def _event(self, event: bytes) -> None:
        payload = event.removeprefix(b"data:").strip()
        if not payload or payload == b"[DONE]" or event.startswith(b":"):
            return
        # Keep the order: earlier forwarded tokens come first.
        self.settle()
        if self._ours and (at := event.find(_CHOICES)) >= 0:
            self._theirs = event[: at + len(_CHOICES)]
        delta = self._engine.dialect.parse_event(payload, self._state)
        if delta.usage is not None:
            self.prompt_tokens = self._sink.prompt_tokens = delta.usage.prompt
            self.cached_tokens = delta.usage.cached
            self.reasoning_tokens = self._sink.reasoning_tokens = delta.usage.reasoning
            # What the prefill engine has told comes first.
            self._sink.cached_tokens = self._sink.cached_tokens or self.cached_tokens
            if UNKNOWN_TOKEN in self._state.emitted or self._state.told is not None:
                # Such answers are known only by their number of tokens. They never continue by token ids.
                self.completion_tokens = delta.usage.completion
            if self._state.told is not None and self.completion_tokens > self.tokens:
                self._sink.completion_tokens = self.completion_tokens
                self._arrived(self.completion_tokens - self.tokens)
        if delta.prompt_ids and not self._state.prompt_ids:
            # A later engine reports the tokens so far as a part of its prompt.
            self._state.prompt_ids = delta.prompt_ids
        self.hand_over = delta.hand_over or self.hand_over
        if delta.choice is None:
            return
        if delta.token_ids:
            self._arrived(len(delta.token_ids))
        self._state.emitted += delta.token_ids
        self._state.reasoned = self._state.reasoned or _has_reasoning(payload)
        self._state.held = self._state.held + len(delta.token_ids) if _is_silent(delta.choice) else 0
        new = self._not_again(delta.token_ids) if self._state.again else delta.token_ids
        self.finished = self.finished or delta.finish_reason is not None
        await self._sink.add(delta.choice, new)

    def _not_again(self, token_ids: list[int]) -> list[int]:
        """The token ids that the client does not have yet. Raises CannotResume if they differ from those it has."""
        again = self._state.again
        count = min(len(again), len(token_ids))
        if self._sink.shows_token_ids and again[:count] != token_ids[:count]:
            raise CannotResume(
                "the engine failed in the middle of a character, and the next engine sampled other tokens"
            )
        del again[:count]
        return token_ids[count:]

    def _arrived(self, tokens: int) -> None:
        now = time.monotonic()
        if self._last_at:
            self._gaps.add((now - self._last_at) / tokens, tokens)
        else:
            if now > self._valid_until:
                message = f"{self._engine.name} began after the lease of the KV that it read"
                raise EngineError(409, message, "kv_lost", kv_lost=True)
            self._first_at = now
            self._timing.token(now)
            if self._on_first_token is not None:
                self._on_first_token()
        self._engine.heard_at = now
        self.tokens += tokens
        self._last_at = now


def _ids_in(data: bytes) -> list[bytes]:
    """The token ids of ordinary events, as text; events without one are left out."""
    return [ids for ids in _IDS_OF.findall(data) if ids]


def _held(reads: list[bytes]) -> tuple[int, bool]:
    """Tokens after the last text in these ordinary events, and whether there was any text."""
    held = 0
    for data in reversed(reads):
        for event in reversed(data[:-2].split(_END)):
            if b'"text":""' not in event and b'"content":""' not in event:
                return held, True
            ids = _IDS_OF.search(event)
            held += len(ids[1].split(b",")) if ids and ids[1] else 0
    return held, False


def _has_reasoning(data: bytes) -> bool:
    # Looking for the word first is many times as fast as the pattern.
    return b'"reasoning' in data and _REASONING.search(data) is not None


def _is_silent(choice: Choice) -> bool:
    """Whether a choice has no text."""
    said = bytes(choice.get("text", choice.get("delta", b"{}")))
    return said in (b'""', b"{}") or b'"content":""' in said
