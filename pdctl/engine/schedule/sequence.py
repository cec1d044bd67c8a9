"""One request in the scheduler: ids and counts, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from pdctl.engine.ipc.messages import PromptToken, Sampling
from pdctl.engine.speculation import Drafter

# Limit of prompt logit rows per sequence and step: each row is as wide as the vocabulary.
_MAX_PROMPT_ROWS = 256


class Status(Enum):
    """The state of a sequence. Only RUNNING ones are computed."""

    WAITING = auto()  # for blocks or budget
    RUNNING = auto()
    AWAITING_BLOCKS = auto()  # a hand-over is coming; its blocks are not reserved yet
    AWAITING_KV = auto()  # blocks reserved, KV being pulled
    HELD = auto()  # prefilled, blocks kept for a peer
    ENDED = auto()  # over, but a step that was launched before computes it and uses its blocks


class Pace(NamedTuple):
    """When a sequence had its first token in this engine and its newest, in monotonic seconds, and the number of tokens
    since the first."""

    first_at: float
    newest_at: float
    later: int = 0

    def due(self, tpot_s: float) -> float:
        """When the next token is due. Tokens that came early give slack; late ones are not caught up with."""
        return max(self.first_at + (self.later + 1) * tpot_s, self.newest_at + tpot_s)


@dataclass(slots=True)
class Drafting:
    """Guesses of a sequence's next tokens. `guesses`: of this step, verified or not; `rate`: the part that is right."""

    drafter: Drafter
    rate: float
    guesses: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Sequence:
    """One sequence. `token_ids`: prompt and output; KV exists for the first `num_computed` of them."""

    request_id: str
    token_ids: list[int]
    prompt_len: int
    sampling: Sampling
    hold: bool = False
    hold_at: int = 0  # with `hold`: not before it has KV of so many tokens
    offer: bool = False  # its first chunks may be read before the last one is computed
    offered: bool = False
    kv_tokens: int = 0
    status: Status = Status.WAITING
    num_computed: int = 0
    in_flight: int = 0  # steps with it that were scheduled and whose results are not applied
    arrival: int = 0
    arrived_s: float = 0.0
    priority: int = 0  # lower goes first
    ttft_s: float = 0.0  # target for its first token, seconds after arrival; 0: the engine's default
    tpot_s: float = 0.0  # target for each later one, seconds; 0: none
    pace: Pace | None = None  # since its first token here
    preemptions: int = 0
    passes: int = 0  # steps that others got although it was being prefilled
    was_computed: bool = False  # in the last step
    out_of_turn: bool = False  # admitted because it had waited too long
    block_ids: list[int] = field(default_factory=list)
    salt: str = ""  # requests with different salts share no blocks
    block_names: list[bytes] = field(default_factory=list)
    num_named: int = 0  # its first blocks, which others may find
    num_whole: int = 0  # its first tokens, computed in whole segments
    kv_segment: int = 0  # the segment of the peer that has computed its KV
    num_cached: int = 0  # tokens of the prompt whose KV was found at its first admission
    drafting: Drafting | None = None  # since its first guess
    guide: object = None  # set by the runner: the state of its grammar
    prompt_logprobs: list[PromptToken] = field(default_factory=list)

    @property
    def num_missing(self) -> int:
        """Tokens whose KV is still to be computed."""
        return len(self.token_ids) - self.num_computed

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether log probabilities of the prompt's tokens are requested and not all computed."""
        return self.sampling.prompt_logprobs >= 0 and len(self.prompt_logprobs) < self.prompt_len - 1

    def take_prompt_logprobs(self) -> list[PromptToken] | None:
        """The prompt's log probabilities with the first new token; None with later ones, or if not requested."""
        if self.sampling.prompt_logprobs < 0 or self.num_output:
            return None
        return self.prompt_logprobs

    @property
    def max_chunk(self) -> int:
        """Missing tokens that one step may compute."""
        return min(self.num_missing, _MAX_PROMPT_ROWS) if self.lacks_prompt_logprobs else self.num_missing

    @property
    def num_output(self) -> int:
        """Tokens after the prompt, resumed ones included."""
        return len(self.token_ids) - self.prompt_len
