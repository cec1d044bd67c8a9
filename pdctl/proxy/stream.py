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

from pdctl.adapters import EngineError, Turn
from pdctl.lean_http import Exchange
from pdctl.proxy.metrics import Metrics
from pdctl.proxy.pool import Engine
from pdctl.proxy.sinks import Sink
from pdctl.proxy.timing import Timing

_END = b"\n\n"
_GOES_ON = b'"finish_reason":null'
_IDS = b'"token_ids":['
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
        self._metrics = metrics
        self._raw: list[bytes] = []
        self._passes = sink.passes and engine.dialect.client_ready(turn)
        self._hides = sink.hides_token_ids
        self._first_at = self._last_at = 0.0

    @property
    def seconds(self) -> float:
        """From the first tokens to the last."""
        return self._last_at - self._first_at

    async def run(self, exchange: Exchange) -> None:
        """Pass everything on. Raises Unreachable, EngineError."""
        rest = b""
        while (data := await exchange.read()) is not None:
            if rest:
                data = rest + data
            end = data.rfind(_END) + 2
            if end < 2:
                rest = self._incomplete(data)
                continue
            rest = data[end:]
            ordinary = self._ordinary(data, end) if self._passes else 0
            if ordinary:
                await self._pass_on(data if ordinary == len(data) else data[:ordinary])
            if ordinary < end:
                for event in data[ordinary : end - 2].split(_END):
                    await self._event(event)

    def settle(self) -> None:
        """Decode the token ids of what was passed on."""
        if self._raw:
            kept, self._raw = b"".join(self._raw), []
            for ids in _IDS_OF.findall(kept):
                if ids:
                    self._turn.emitted.extend(map(int, ids.split(b",")))

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

    async def _pass_on(self, data: bytes) -> None:
        count = data.count(_END)
        self._arrived(count)
        # Kept before it is sent: a token that may have reached the client is never sent again.
        self._raw.append(data)
        if len(self._raw) >= _KEPT:
            self.settle()
        await self._sink.pass_on(_HIDDEN.sub(b"", data) if self._hides else data)

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
        self.finished = self.finished or delta.finish_reason is not None
        await self._sink.add(delta.choice, delta.token_ids)

    def _arrived(self, tokens: int) -> None:
        now = time.monotonic()
        if self._last_at:
            gap = now - self._last_at
            self._metrics.gaps.add(gap / tokens, tokens)
            self._engine.heard(now, gap)
        else:
            self._first_at = now
            self._engine.heard_at = now
            self._timing.token(now)
        self.tokens += tokens
        self._last_at = now
