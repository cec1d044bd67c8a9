"""Reading an engine's event stream: what is ordinary goes on as bytes, what is not is looked at event by event.

A read usually brings events of a running stream: no end, no error, token ids in each. Those are passed on in one write
without being parsed, token ids cut out where the client did not ask for them; their ids are decoded later, many at a
time. Whether a read is ordinary is decided by counting: each event must have its `"finish_reason":null` and its
`"token_ids":[`. Inside a JSON string a quote is escaped, so no text can imitate either; anything else, such as an
engine that writes its JSON with blanks, only takes the slow way.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_left

from pdctl.adapters import CannotResume, Choice, EngineError, RequestState
from pdctl.net.http_client import Exchange
from pdctl.proxy.answers.sinks import Sink
from pdctl.proxy.engines.pool import Engine
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
# Reads whose token ids are kept as text before they are decoded.
_KEPT = 32
# Events at the end of a read that may be anything but ordinary: the last token, the counts, [DONE].
_TAIL = 3
# One event at most, bytes: an engine that sends more without an end is not speaking our protocol.
_MAX_EVENT = 16 * 2**20


class EventReader:
    """Reads one stream to its end. `seconds`: from its first tokens to its last."""

    def __init__(self, engine: Engine, state: RequestState, sink: Sink, timing: Timing, metrics: Metrics) -> None:
        self.tokens = 0
        self.prompt_tokens = 0
        self.finished = False
        self._engine = engine
        self._turn = state
        self._sink = sink
        self._timing = timing
        # Of events that were passed on: token ids as they stood there, and the events.
        self._ids: list[bytes] = []
        self._reads: list[bytes] = []
        self._tail = b""
        self._rest = b""
        # What events begin with, up to the choice, where the engine's beginning is not the client's.
        self._ours = sink.event_head if engine.dialect.own_envelopes else b""
        self._theirs = b""
        # Token ids that the client has already are cut out event by event.
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
        """Pass everything on. Raises Unreachable, EngineError."""
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
            # The prompt's ids come once, with the first token, and a continuation may need them.
            ordinary = self._ordinary(data, end) if self._passes and _PROMPT_LIST not in data else 0
            if ordinary:
                data, tail = data[:ordinary], data[ordinary:end]
                await self._sink.pass_on(self._noted(data, data.count(_END)))
            else:
                tail = data[:end]
            if tail:
                for event in tail[:-2].split(_END):
                    await self._event(event)

    def _take(self, data: bytes) -> float:
        """Pass on a read of whole, ordinary events there and then, if the client takes it; 0.0 if not.

        The path of nearly every token: a few microseconds, so in one piece.
        """
        # Of what bytes can do, these calls cost least: they look from the end, or for one byte.
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
        if not self._part_now(shown):
            return 0.0
        # Nothing can come between sending and keeping: there is no await here.
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
        """Whether `tail` is the end of one event, with nothing behind it: the same for all of a stream's, nearly."""
        # A tail of one byte has no end either: -1 is not its place.
        if not tail.endswith(_END) or tail.find(_END) != len(tail) - 2:
            return False
        self._tail = tail
        return True

    def _take_several(self, data: bytes) -> float:
        """As `_take`, for a read of more than one event, or of less."""
        count = data.count(_END)
        if not self._last_at or self._rest or not data.endswith(_END) or self._ordinary(data, len(data)) < len(data):
            return 0.0
        if not self._part_now(self._shown(data)):
            return 0.0
        self._keep(data)
        self._arrived(count)
        return self._last_at

    def _keep(self, data: bytes) -> None:
        """The token ids of ordinary events, for later."""
        self._ids += _IDS_OF.findall(data)
        self._reads.append(data)
        if len(self._ids) >= _KEPT:
            self.settle()

    def _shown(self, data: bytes) -> bytes:
        """Ordinary events as the client gets them."""
        if self._hides:
            data = _HIDDEN.sub(b"", data)
        # Inside a JSON string a quote is escaped: no text can imitate the beginning of an event.
        return data.replace(self._theirs, self._ours) if self._ours else data

    def settle(self) -> None:
        """Decode the token ids of what was passed on."""
        if self._ids:
            kept, self._ids = b",".join(filter(None, self._ids)), []
            if self.tokens > 1:
                self._engine.paced((self._last_at - self._first_at) / (self.tokens - 1))
            if kept:
                self._turn.emitted.extend(map(int, kept.split(b",")))
            reads, self._reads = self._reads, []
            held, said = _held(reads)
            self._turn.held = held if said else self._turn.held + held

    def _incomplete(self, data: bytes) -> bytes:
        if len(data) > _MAX_EVENT:
            raise EngineError(502, f"{self._engine.name} sent {len(data)} bytes without an event's end", "bad_upstream")
        return data

    def _ordinary(self, data: bytes, end: int) -> int:
        """Up to where `data`, whole events up to `end`, holds nothing but ordinary ones."""
        for _ in range(_TAIL + 1):
            count = data.count(_END, 0, end)
            begun = not self._ours or (self._theirs != b"" and data.count(self._theirs, 0, end) == count)
            if begun and data.count(_GOES_ON, 0, end) == count and data.count(_IDS, 0, end) == count:
                return end
            end = data.rfind(_END, 0, end - 2) + 2
            if end < 2:
                return 0
        return 0

    def _noted(self, data: bytes, count: int) -> bytes:
        """Ordinary events as the client gets them, their tokens in the books."""
        self._arrived(count)
        # Kept before it is sent: a token that may have reached the client is never sent again.
        self._keep(data)
        return self._shown(data)

    async def _event(self, event: bytes) -> None:
        payload = event.removeprefix(b"data:").strip()
        if not payload or payload == b"[DONE]" or event.startswith(b":"):
            return
        # In order: what was passed on before comes before.
        self.settle()
        if self._ours and (at := event.find(_CHOICES)) >= 0:
            self._theirs = event[: at + len(_CHOICES)]
        delta = self._engine.dialect.parse_event(payload, self._turn)
        if delta.usage is not None:
            self.prompt_tokens = self._sink.prompt_tokens = delta.usage[0]
        if delta.prompt_ids:
            self._turn.prompt_ids = delta.prompt_ids
        if delta.choice is None:
            return
        if delta.token_ids:
            self._arrived(len(delta.token_ids))
        self._turn.emitted += delta.token_ids
        self._turn.held = self._turn.held + len(delta.token_ids) if _is_silent(delta.choice) else 0
        new = self._not_again(delta.token_ids) if self._turn.again else delta.token_ids
        self.finished = self.finished or delta.finish_reason is not None
        await self._sink.add(delta.choice, new)

    def _not_again(self, token_ids: list[int]) -> list[int]:
        """Those of `token_ids` that the client has not got yet. Raises CannotResume where they differ from its own."""
        again = self._turn.again
        count = min(len(again), len(token_ids))
        if self._sink.shows_token_ids and again[:count] != token_ids[:count]:
            raise CannotResume("the engine failed within a character, and the next one drew other tokens")
        del again[:count]
        return token_ids[count:]

    def _arrived(self, tokens: int) -> None:
        now = time.monotonic()
        if self._last_at:
            self._gaps.add((now - self._last_at) / tokens, tokens)
        else:
            self._first_at = now
            self._timing.token(now)
        self._engine.heard_at = now
        self.tokens += tokens
        self._last_at = now


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


def _is_silent(choice: Choice) -> bool:
    """Whether a choice brings no text."""
    said = bytes(choice.get("text", choice.get("delta", b"{}")))
    return said in (b'""', b"{}") or b'"content":""' in said
