"""A request's time by phase, as measured by the proxy and reported by the decode engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import NamedTuple


class FailedCall(NamedTuple):
    """A call to an engine that failed, and after which the request went on elsewhere. `at`: monotonic seconds; `pair`:
    the engines of that try; `tokens`: those that the client had."""

    at: float
    engine: str
    pair: tuple[str, str]
    tokens: int
    reason: str


@dataclass(slots=True)
class Timing:
    """Times in monotonic seconds; 0.0 if not happened. After a failed attempt only the first token's time is kept.

    `moved_at`: its stream ended, to go on at another engine.
    `stages`: the decode engine's seconds for hand_over, admission and first_step, and hand-over `bytes`. `failed`: the
    calls that failed, None for none.
    """

    received_at: float = field(default_factory=time.monotonic)
    admitted_at: float = 0.0
    prefilled_at: float = 0.0
    first_token_at: float = 0.0
    decode_at: float = 0.0
    moved_at: float = 0.0
    engines: tuple[str, str] = ("", "")
    stages: dict[str, float] = field(default_factory=dict)
    failed: list[FailedCall] | None = None

    @property
    def handed_over_at(self) -> float:
        """When the KV for the decode engine was complete."""
        return self.moved_at or self.prefilled_at

    def prefilled(self, now: float) -> None:
        """The prefill engine has answered."""
        self.prefilled_at = now

    def token(self, now: float) -> None:
        """A token has arrived; only the first one is recorded."""
        if not self.first_token_at:
            self.first_token_at = now

    def engine_says(self, said: str | None) -> None:
        """Take the decode engine's stages from the head of its answer, if present."""
        self.decode_at = time.monotonic()
        if said:
            self.stages = parse_stages(said)

    def failed_at(self, call: FailedCall) -> None:
        """A call has failed, and the request goes on."""
        if self.failed is None:
            self.failed = []
        self.failed.append(call)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Begin and end of each phase in monotonic seconds. The engine's stages are consecutive and end at its first
        answer."""
        admitted = self.admitted_at or self.received_at
        found = {"queue": (self.received_at, admitted)}
        if self.prefilled_at:
            found["prefill"] = (admitted, self.prefilled_at)
        at = self.decode_at
        for name in ("first_step", "admission", "hand_over"):
            if name in self.stages:
                found[name] = (at - self.stages[name], at)
                at -= self.stages[name]
        return found

    def parts(self) -> dict[str, float]:
        """Seconds of each known phase, in order."""
        admitted = self.admitted_at or self.received_at
        found = {"queue": admitted - self.received_at}
        if self.prefilled_at:
            found["prefill"] = self.prefilled_at - admitted
        found |= {name: seconds for name, seconds in self.stages.items() if name != "bytes"}
        if self.first_token_at:
            found["ttft"] = self.first_token_at - self.received_at
        return found

    def header(self) -> str:
        """The phases in the format of Server-Timing: `name;dur=MILLISECONDS`, separated by commas; `desc`: the
        engine."""
        told = {name: f"{name};dur={seconds * 1000:.3f}" for name, seconds in self.parts().items()}
        for name, engine in zip(("prefill", "decode"), self.engines, strict=True):
            if engine:
                told[name] = f"{told.get(name, name)};desc={engine}"
        return ", ".join(told.values())


def parse_stages(said: str) -> dict[str, float]:
    """Parse `name=number` separated by commas; anything else is ignored."""
    found = {}
    for part in said.split(","):
        name, _, value = part.strip().partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            continue
    return found
