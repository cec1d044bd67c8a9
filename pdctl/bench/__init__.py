"""Measure a service as its clients experience it: the requests, their send times, and the answers.

A workload (`workload`, `trace`) is a list of `Asked`; `arrivals` gives the send times; `client` sends the requests and
makes a `Record` of each; `metrics` computes measurements from records, by the definitions of vLLM's `bench serve`;
`report` shows them.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Asked:
    """One request to send: token ids or text, and the maximum number of output tokens. `at`: send time in seconds after
    the start; None if `arrivals` decides."""

    prompt: list[int] | str
    max_tokens: int
    at: float | None = None


@dataclass(slots=True)
class Record:
    """The result of a request. Times are seconds of the monotonic clock; `gaps`: between events with a choice.

    `planned_at`: when it should have been sent; `sent_at`: when it was sent. `error`: why it failed; "" for a complete
    answer. `is_truncated`: the stream was cut off without an error. `has_usage`: the service reported token counts.
    `parts`: seconds by phase, as the service reports them.
    """

    planned_at: float
    sent_at: float = 0.0
    first_at: float = 0.0
    ended_at: float = 0.0
    gaps: list[float] = field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    error: str = ""
    is_truncated: bool = False
    has_usage: bool = True
    parts: dict[str, float] = field(default_factory=dict)
    engines: dict[str, str] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        """Whether the answer is complete."""
        return not self.error and not self.is_truncated

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.first_at - self.sent_at

    @property
    def latency(self) -> float:
        """Seconds to the last token (E2E)."""
        return self.ended_at - self.sent_at

    @property
    def tpot(self) -> float:
        """Seconds per token after the first (vLLM's definition); 0 for an answer of one token."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0
