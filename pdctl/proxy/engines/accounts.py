"""What calls do to an engine's load and statistics. Pure: times (monotonic seconds) are passed."""

from __future__ import annotations

from collections.abc import Sequence

from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.engines.fleet import Fleet
from pdctl.proxy.engines.load import LoadMeter


class PromptLoad:
    """A prefill call's load, from its beginning to `end`. `size`: bytes of the prompt."""

    def __init__(self, fleet: Fleet, engine: Engine, size: float, now: float) -> None:
        self._fleet, self._engine, self._size = fleet, engine, size
        self._began = now
        engine.prompts.begin(size, now)
        fleet.publish(engine)

    def end(self, now: float, done: bool) -> None:
        """The call is over."""
        self._engine.prompts.end(self._size, now, done)
        self._fleet.publish(self._engine)

    def answered(self, now: float, pieces: Sequence[int]) -> None:
        """It was answered. `pieces`: the prompt's prefixes."""
        self._engine.prefill_s.add(now - self._began)
        answered(self._engine, self._began, now, pieces)


class AnswerLoad:
    """A decode call's load: its prompt until the first token if the engine computes that, too, and then a stream."""

    def __init__(self, fleet: Fleet, engine: Engine, size: float, with_prompt: bool, now: float) -> None:
        self._fleet, self._engine, self._size = fleet, engine, size
        self._in_prompt = with_prompt
        self._began = now
        self._begin(now)

    def first_token(self, now: float, prefilled_at: float) -> None:
        """The first token is here. `prefilled_at`: the end of the prefill by another engine, 0 if unknown."""
        if not self._in_prompt and prefilled_at:
            self._engine.took_over(now - prefilled_at)
        if self._in_prompt:
            self._engine.prompts.end(self._size, now, done=True)
            self._in_prompt = False
            self._begin(now)

    def end(self, now: float, done: bool) -> None:
        """The call is over."""
        meter, amount = self._meter()
        meter.end(amount, now, done)
        self._fleet.publish(self._engine)

    def answered(self, now: float, pieces: Sequence[int]) -> None:
        """The whole answer is here. `pieces`: the prompt's prefixes."""
        answered(self._engine, self._began, now, pieces)

    def _begin(self, now: float) -> None:
        meter, amount = self._meter()
        meter.begin(amount, now)
        self._fleet.publish(self._engine)

    def _meter(self) -> tuple[LoadMeter, float]:
        return (self._engine.prompts, self._size) if self._in_prompt else (self._engine.streams, 1.0)


def answered(engine: Engine, began: float, now: float, pieces: Sequence[int]) -> None:
    """A call was answered."""
    engine.took_s.append(now - began)
    engine.breaker.succeeded()
    if pieces:
        engine.prefixes.add(pieces, now)


def unreachable(engine: Engine, now: float) -> None:
    """A call did not reach the engine, or lost it."""
    engine.breaker.failed(now)
    engine.prefill_s.failed()
    engine.token_s.failed()
