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

from pdctl.adapters import Choice, EngineError, Turn
from pdctl.lean_http import Exchange
from pdctl.proxy.metrics import Metrics
from pdctl.proxy.pool import Engine
from pdctl.proxy.sinks import Sink
from pdctl.proxy.timing import Timing

_END = b"\n\n"
_GOES_ON = b'"finish_reason":null'
_IDS = b'"token_ids":['
_PROMPT_IDS = b'"prompt_token_ids"'
_PROMPT_LIST = b'"prompt_token_ids":['
_IDS_OF = re.compile(rb'"token_ids":\[([\d,]*)\]')
_HIDDEN = re.compile(rb',"(?:prompt_)?token_ids":(?:null|\[[\d,]*\])')
# Reads kept before their token ids are decoded.
_KEPT = 16
# Events at the end of a read that may be anything but ordinary: the last token, the counts, [DONE].
_TAIL = 3
# One event at most, bytes: an engine that sends more without an end is not speaking our protocol.
_MAX_EVENT = 16 * 2**20


class EventReader:
    """Reads one stream to its end. `seconds`: from its first tokens to its last."""

    def __init__(self, engine: Engine, turn: Turn, sink: Sink, timing: Timing, metrics: Metrics) -> None:
        self.tokens = 0
        self.prompt_tokens = 0
        self.finished = False
        self._engine = engine
        self._turn = turn
        self._sink = sink
        self._timing = timing
        self._raw: list[bytes] = []
        self._rest = b""
        self._passes = sink.passes and engine.dialect.client_ready(turn)
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
        count = data.count(_END)
        if data.count(_GOES_ON) != count or data.count(_IDS) != count or self._rest or not data.endswith(_END):
            return 0.0
        now = time.monotonic()
        if not self._last_at or not self._part_now(self._visible(data, count) if self._hides else data):
            return 0.0
        # Nothing can come between sending and keeping: there is no await here.
        self._raw.append(data)
        gap = now - self._last_at
        self._gaps.counts[bisect_left(self._gaps.bounds, gap / count)] += count
        self._gaps.total += gap
        self._last_at = self._engine.heard_at = now
        self.tokens += count
        if len(self._raw) >= _KEPT:
            self.settle()
        return now

    def _visible(self, data: bytes, count: int) -> bytes:
        """Events without token ids."""
        if count == 1 and _PROMPT_IDS not in data:
            start = data.find(_IDS) - 1
            return data[:start] + data[data.find(b"]", start) + 1 :]
        return _HIDDEN.sub(b"", data)

    def settle(self) -> None:
        """Decode the token ids of what was passed on."""
        if self._raw:
            kept, self._raw = b"".join(self._raw), []
            if self.tokens > 1:
                self._engine.paced((self._last_at - self._first_at) / (self.tokens - 1))
            for ids in _IDS_OF.findall(kept):
                if ids:
                    self._turn.emitted.extend(map(int, ids.split(b",")))
            last = kept[kept.rfind(_END, 0, -2) + 2 :]
            self._turn.is_held_back = b'"text":""' in last or b'"content":""' in last

    def _incomplete(self, data: bytes) -> bytes:
        if len(data) > _MAX_EVENT:
            raise EngineError(502, f"{self._engine.name} sent {len(data)} bytes without an event's end", "bad_upstream")
        return data

    def _ordinary(self, data: bytes, end: int) -> int:
        """Up to where `data`, whole events up to `end`, holds nothing but ordinary ones."""
        for _ in range(_TAIL + 1):
            count = data.count(_END, 0, end)
            if data.count(_GOES_ON, 0, end) == count and data.count(_IDS, 0, end) == count:
                return end
            end = data.rfind(_END, 0, end - 2) + 2
            if end < 2:
                return 0
        return 0

    def _noted(self, data: bytes, count: int) -> bytes:
        """Ordinary events as the client gets them, their tokens in the books."""
        self._arrived(count)
        # Kept before it is sent: a token that may have reached the client is never sent again.
        self._raw.append(data)
        if len(self._raw) >= _KEPT:
            self.settle()
        return self._visible(data, count) if self._hides else data

    async def _event(self, event: bytes) -> None:
        payload = event.removeprefix(b"data:").strip()
        if not payload or payload == b"[DONE]" or event.startswith(b":"):
            return
        # In order: what was passed on before comes before.
        self.settle()
        delta = self._engine.dialect.parse_event(payload, self._turn)
        if delta.usage is not None:
            self.prompt_tokens = delta.usage[0]
        if delta.prompt_ids:
            self._turn.prompt_ids = delta.prompt_ids
        if delta.choice is None:
            return
        if delta.token_ids:
            self._arrived(len(delta.token_ids))
        self._turn.emitted += delta.token_ids
        self._turn.is_held_back = _is_silent(delta.choice)
        self.finished = self.finished or delta.finish_reason is not None
        await self._sink.add(delta.choice, delta.token_ids)

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


def _is_silent(choice: Choice) -> bool:
    """Whether a choice brings no text."""
    said = bytes(choice.get("text", choice.get("delta", b"{}")))
    return said in (b'""', b"{}") or b'"content":""' in said
