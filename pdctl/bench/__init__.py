"""Measures a service as its clients see it: what is asked, when, and what came back.

A workload (`workload`, `trace`) is a list of `Asked`; `arrivals` says when each is sent; `client` sends them and writes
down a `Record` for each; `metrics` makes figures of records, by the definitions of vLLM's `bench serve`; `report` shows
them.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Asked:
    """One request to be: token ids or text, and the most tokens of its answer. `at`: seconds after the start, None for
    when arrivals say."""

    prompt: list[int] | str
    max_tokens: int
    at: float | None = None


@dataclass(slots=True)
class Record:
    """What became of a request. Times in seconds of the monotonic clock; `gaps` between events that brought text.

    `planned_at`: when it should have been sent, `sent_at` when it was. `error`: why it failed; "" for an answer that
    ended as it should. `is_truncated`: a stream that broke off without an error. `has_usage`: the service told how many
    tokens there were. `parts`: seconds by name, as the service says.
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
        """Whether it was answered to its end."""
        return not self.error and not self.is_truncated

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.first_at - self.sent_at

    @property
    def latency(self) -> float:
        """Seconds to the last."""
        return self.ended_at - self.sent_at

    @property
    def tpot(self) -> float:
        """Seconds for each token after the first (vLLM's definition); 0 for an answer of one token."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0
