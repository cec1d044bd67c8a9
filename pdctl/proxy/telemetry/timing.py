"""Where a request's time went, as the proxy saw it and as the decode engine said."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class Timing:
    """Monotonic seconds; 0.0 for what has not happened. Of an attempt that failed only the first token stays.

    `stages`: seconds the decode engine spent on hand_over, admission and first_step, and hand-over `bytes`.
    """

    received_at: float = field(default_factory=time.monotonic)
    admitted_at: float = 0.0
    prefilled_at: float = 0.0
    first_token_at: float = 0.0
    decode_at: float = 0.0
    engines: tuple[str, str] = ("", "")
    stages: dict[str, float] = field(default_factory=dict)

    def prefilled(self, now: float) -> None:
        """Prefill has answered."""
        self.prefilled_at = now

    def token(self, now: float) -> None:
        """A token is here; the first one counts."""
        if not self.first_token_at:
            self.first_token_at = now

    def engine_says(self, said: str | None) -> None:
        """The head of the decode engine's answer is here, and with it perhaps its own stages."""
        self.decode_at = time.monotonic()
        if said:
            self.stages = parse_stages(said)

    def parts(self) -> dict[str, float]:
        """Seconds of each part that is known, in order."""
        admitted = self.admitted_at or self.received_at
        found = {"queue": admitted - self.received_at}
        if self.prefilled_at:
            found["prefill"] = self.prefilled_at - admitted
        found |= {name: seconds for name, seconds in self.stages.items() if name != "bytes"}
        if self.first_token_at:
            found["ttft"] = self.first_token_at - self.received_at
        return found

    def header(self) -> str:
        """As Server-Timing words them: `name;dur=MILLISECONDS`, with commas; `desc` names the engine."""
        told = {name: f"{name};dur={seconds * 1000:.3f}" for name, seconds in self.parts().items()}
        for name, engine in zip(("prefill", "decode"), self.engines, strict=True):
            if engine:
                told[name] = f"{told.get(name, name)};desc={engine}"
        return ", ".join(told.values())


def parse_stages(said: str) -> dict[str, float]:
    """`name=number` with commas; anything else is left out."""
    found = {}
    for part in said.split(","):
        name, _, value = part.strip().partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            continue
    return found
