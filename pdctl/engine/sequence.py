"""One request as the scheduler sees it: ids and counts, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from pdctl.engine.messages import PromptToken, Sampling

# Rows of logits that one sequence may ask for in a step: each is as wide as the vocabulary.
_MAX_PROMPT_ROWS = 256


class Status(Enum):
    """Where a sequence stands. Only RUNNING ones are computed."""

    WAITING = auto()  # for blocks or budget
    RUNNING = auto()
    AWAITING_BLOCKS = auto()  # a hand-over is coming; its blocks are not reserved yet
    AWAITING_KV = auto()  # blocks reserved, KV being pulled
    HELD = auto()  # prefilled, blocks kept for a peer


@dataclass(slots=True)
class Sequence:
    """`token_ids` holds prompt and output; KV exists for the first `num_computed` of them."""

    request_id: str
    token_ids: list[int]
    prompt_len: int
    sampling: Sampling
    hold: bool = False
    offer: bool = False  # its first chunks may be read before the last one is computed
    offered: bool = False
    kv_tokens: int = 0
    status: Status = Status.WAITING
    num_computed: int = 0
    arrival: int = 0
    preempted: bool = False
    block_ids: list[int] = field(default_factory=list)
    guide: object = None  # the runner's: where its grammar stands
    prompt_told: list[PromptToken] = field(default_factory=list)

    @property
    def num_missing(self) -> int:
        """Tokens whose KV is still to be computed."""
        return len(self.token_ids) - self.num_computed

    @property
    def tells_prompt(self) -> bool:
        """Whether the model's thoughts about the prompt's tokens are still to be told."""
        return self.sampling.prompt_logprobs >= 0 and len(self.prompt_told) < self.prompt_len - 1

    def take_prompt_told(self) -> list[PromptToken] | None:
        """What was told of the prompt, to go with the first new token; None with later ones, or where nobody asked."""
        if self.sampling.prompt_logprobs < 0 or self.num_output:
            return None
        return self.prompt_told

    @property
    def max_chunk(self) -> int:
        """Missing tokens that one step may compute."""
        return min(self.num_missing, _MAX_PROMPT_ROWS) if self.tells_prompt else self.num_missing

    @property
    def num_output(self) -> int:
        """Tokens after the prompt, resumed ones included."""
        return len(self.token_ids) - self.prompt_len
