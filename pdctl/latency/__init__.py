"""How long a step of an engine takes, from what it computes: one model for scheduling, routing, admission and planning.

seconds = a + b * tokens + c * attention + d * sequences + e * context

This is the form of DistServe's simulator (Zhong et al., OSDI 2024), extended to steps that mix prompts and decodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Literal, NamedTuple

import msgspec

Kind = Literal["prefill", "decode", "mixed"]
KINDS: tuple[Kind, ...] = ("prefill", "decode", "mixed")

# How long a step with a chunk of a prompt may take. Engines keep this, and the proxy predicts with it.
#
# Prompts get at least so much of a step as its decodes: where these alone miss their target, or nearly, there is no
# target to protect, and prompts must get on.
LEAST_STEP = 2.0
# A sequence that a peer hands over during a step waits for this part of its target at most. With less, steps have fewer
# tokens than they could: in simulations of the code trace 0.5 cost a fifth of the goodput (docs/performance.md).
ARRIVAL_WAIT = 1.0


class Accuracy(msgspec.Struct, frozen=True, array_like=True):
    """Predictions of one kind of step, made before each step: how many, sums of seconds, and the sum of the relative
    errors."""

    steps: int = 0
    actual_s: float = 0.0
    predicted_s: float = 0.0
    error: float = 0.0


class Step(NamedTuple):
    """What a step computes. `attention`: the sum over prompts of tokens * (tokens before them + tokens / 2); `context`:
    the sum over sequences that decode of the tokens before."""

    tokens: float = 0.0
    attention: float = 0.0
    sequences: float = 0.0
    context: float = 0.0
    decodes: float = 0.0

    @property
    def kind(self) -> Kind:
        """Whether prompts, decodes or both are computed."""
        if not self.decodes:
            return "prefill"
        return "decode" if self.decodes == self.sequences else "mixed"

    @property
    def row(self) -> tuple[float, ...]:
        """The factors of the coefficients."""
        return (1.0, self.tokens, self.attention, self.sequences, self.context)

    def with_prompt(self, count: int, before: int) -> Step:
        """The same step with `count` tokens of a prompt in addition, after `before` others."""
        attention = self.attention + count * (before + count / 2)
        return Step(self.tokens + count, attention, self.sequences + 1, self.context, self.decodes)


def step_of(pieces: Iterable[tuple[int, int]]) -> Step:
    """The step that computes these sequences, each with (tokens, tokens before them)."""
    tokens = sequences = context = decodes = 0
    attention = 0.0
    for count, before in pieces:
        tokens += count
        sequences += 1
        if count == 1:
            decodes += 1
            context += before
        else:
            attention += count * (before + count / 2)
    return Step(tokens, attention, sequences, context, decodes)


class StepTimes(msgspec.Struct, frozen=True, array_like=True):
    """The model of one engine. `coefficients`: a to e, seconds; `corrections`: factors by kind of step, in the order of
    KINDS; `slow`: the 90th percentile of actual divided by predicted seconds."""

    coefficients: tuple[float, float, float, float, float]
    corrections: tuple[float, float, float] = (1.0, 1.0, 1.0)
    slow: float = 1.0

    def seconds(self, step: Step) -> float:
        """The predicted seconds of a step."""
        plain = sum(a * x for a, x in zip(self.coefficients, step.row, strict=True))
        return plain * self.corrections[KINDS.index(step.kind)]

    def prompt_s(self, tokens: float, before: float, budget: int) -> float:
        """The predicted seconds to compute `tokens` of a prompt after `before` others, `budget` a step, with nothing
        else in the steps."""
        per_step, per_token, attention, per_sequence, _ = self.coefficients
        steps = math.ceil(tokens / budget)
        # The chunks' attention adds up to that of the whole, wherever they end.
        plain = steps * (per_step + per_sequence) + tokens * (per_token + attention * (before + tokens / 2))
        return plain * self.corrections[0]

    def chunk(self, decodes: Step, before: float, limit_s: float) -> int:
        """The longest chunk of a prompt, after `before` tokens, with which a step of these decodes takes `limit_s` at
        most, in nine cases of ten; 0 if there is none."""
        per_step, per_token, attention, per_sequence, per_context = self.coefficients
        limit = limit_s / max(1.0, self.slow) / self.corrections[2 if decodes.decodes else 0]
        base = per_step + per_token * decodes.tokens + per_sequence * (decodes.sequences + 1)
        left = limit - base - attention * decodes.attention - per_context * decodes.context
        if left <= 0:
            return 0
        # attention / 2 * n^2 + linear * n = left
        linear = per_token + attention * before
        if attention * left < 1e-9 * linear * linear:
            return int(min(left / linear, 2**31))
        return int((math.sqrt(linear * linear + 2 * attention * left) - linear) / attention) if attention else 2**31


class Work(msgspec.Struct, frozen=True, array_like=True):
    """An engine's model and what it has to do: enough to predict a new request's times.

    `budget`: tokens that a step computes at most; `prompt_tokens`: of prompts that wait or are computed in part;
    `decodes`: sequences that decode, and `context` the sum of their tokens. `accuracy`: in the order of KINDS.
    """

    times: StepTimes
    budget: Annotated[int, msgspec.Meta(ge=1)]
    prompt_tokens: int = 0
    decodes: int = 0
    context: int = 0
    accuracy: tuple[Accuracy, Accuracy, Accuracy] = (Accuracy(), Accuracy(), Accuracy())
