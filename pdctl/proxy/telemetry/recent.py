"""The last requests with the times of their phases, for the live page. Kept only while a supervisor asks for them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from pdctl.net.openai.api import Counts
from pdctl.proxy.telemetry.timing import Timing
from pdctl.proxy_wire import FailedTry, RecentRequest, RequestPhase

_KEPT = 200
# They are kept for so long after the last question, seconds.
_WANTED_S = 120.0
# Phases of the engine that decodes; the others are prefill's.
_OF_DECODE = ("hand_over", "admission", "first_step", "decode")


class RecentRequests:
    """`is_wanted`: whether finished requests are to be added. `clock`: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.is_wanted = False
        self._clock = clock
        self._wanted_until = 0.0
        self._kept: deque[RecentRequest] = deque(maxlen=_KEPT)

    def ask(self) -> tuple[RecentRequest, ...]:
        """The last requests, oldest first. From now on they are kept, for a while."""
        self.is_wanted, self._wanted_until = True, self._clock() + _WANTED_S
        return tuple(self._kept)

    def add(self, name: str, path: str, status: int, counts: Counts, timing: Timing) -> None:
        """A request is over."""
        now = self._clock()
        if now > self._wanted_until:
            self.is_wanted = False
            self._kept.clear()
            return
        self._kept.append(_of(name, path, status, counts, timing, now))


def _of(name: str, path: str, status: int, counts: Counts, timing: Timing, now: float) -> RecentRequest:
    came = timing.received_at
    return RecentRequest(
        id=name,
        path=path,
        status=status,
        at=round(time.time() - (now - came), 3),
        seconds=round(now - came, 6),
        ttft_s=round(timing.first_token_at - came, 6) if timing.first_token_at else None,
        prompt_tokens=counts.prompt,
        cached_tokens=counts.cached,
        output_tokens=counts.completion,
        prefill=timing.engines[0],
        decode=timing.engines[1],
        phases=_phases(timing, now),
        failed=tuple(
            FailedTry(round(call.at - came, 6), call.engine, *call.pair, call.tokens, call.reason)
            for call in timing.failed or ()
        ),
        moved_s=round(timing.moved_at - came, 6) if timing.moved_at else None,
        hand_over_bytes=int(timing.stages.get("bytes", 0)),
    )


def _phases(timing: Timing, now: float) -> tuple[RequestPhase, ...]:
    """The queue, and the phases of the last try: what earlier ones have left in `timing` is left out."""
    began = timing.failed[-1].at if timing.failed else 0.0
    spans = timing.intervals()
    decode_from = max(timing.decode_at or timing.first_token_at, began)
    if decode_from:
        spans["decode"] = (decode_from, now)
    found = []
    for name, (begin, end) in spans.items():
        if name == "queue":
            found.append(_phase(name, begin, end, "", timing))
        elif end > began:
            found.append(_phase(name, max(begin, began), end, timing.engines[name in _OF_DECODE], timing))
    return tuple(sorted(found, key=lambda phase: (phase.begin_s, phase.end_s)))


def _phase(name: str, begin: float, end: float, engine: str, timing: Timing) -> RequestPhase:
    return RequestPhase(name, round(begin - timing.received_at, 6), round(end - timing.received_at, 6), engine)
