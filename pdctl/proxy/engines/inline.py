"""Where a prompt is computed: by the prefill engine of a pair, or inline by a decode engine. Pure.

Both first tokens are predicted with the engines' own latency models. Inline saves the hand-over and a busy prefill
engine's queue, but its chunks are small beside sequences that decode, and they delay these. So short prompts, prompts
that a decode engine has in its cache, and those that would wait elsewhere are computed inline.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from pdctl.latency import ARRIVAL_WAIT, LEAST_STEP, Step, Work

# What an inline prefill costs the sequences beside it, as a part of its own time: without it, two idle engines would
# compute every prompt inline, and the next ones would find the decode engine busy.
_DISTURBANCE = 0.25

Why = Literal["short", "cached", "prefill_busy"]


class Prospect(NamedTuple):
    """One engine, seen by a new prompt. `prompt_tokens`: those before it; `decodes`: sequences; `cached`: tokens of
    this prompt that it probably has. `hand_over_s`: usual time from the end of a prefill to this engine's first token,
    0 if unknown."""

    work: Work
    prompt_tokens: float
    decodes: float
    cached: float = 0.0
    hand_over_s: float = 0.0


def remote_s(prefill: Prospect, decode: Prospect, tokens: float) -> float:
    """Predicted seconds to a first token by a pair, and what the hand-over then costs the second one: as much as usual,
    and at least the wait for the decode engine's next step."""
    step_s = _decode_s(decode)
    return prompts_s(prefill, tokens, prefill.work.budget) + max(decode.hand_over_s - step_s, step_s / 2)


def inline_s(decode: Prospect, tokens: float, tpot_s: float) -> float | None:
    """Predicted seconds to a first token by a decode engine, and what they cost others; None if its sequences miss
    their target even without the prompt."""
    step, times = _decodes(decode), decode.work.times
    if not step.decodes:
        alone = times.chunk(Step(), tokens / 2, ARRIVAL_WAIT * tpot_s) if tpot_s else decode.work.budget
        return prompts_s(decode, tokens, min(max(alone, 1), decode.work.budget)) * (1 + _DISTURBANCE)
    base = _decode_s(decode)
    if tpot_s and base > tpot_s:
        return None
    room = max(1, decode.work.budget - int(step.decodes))
    chunk = times.chunk(step, tokens / 2, max(tpot_s, LEAST_STEP * base)) if tpot_s else room
    chunk = min(max(chunk, 1), room)
    steps = (decode.prompt_tokens + tokens) / chunk
    return prompts_s(decode, tokens, chunk) * (1 + _DISTURBANCE) + steps * base


def is_better(
    prefill: Prospect, decode: Prospect, other: Prospect, tokens: float, tpot_s: float
) -> tuple[float, Why] | None:
    """How many seconds earlier `other` has the first token inline than the pair, and why; None if it has not.

    `decode`: the pair's decode engine, which may be the same one.
    """
    ours = inline_s(other, tokens, tpot_s)
    if ours is None or (saved := remote_s(prefill, decode, tokens) - ours) <= 0:
        return None
    if other.cached > prefill.cached:
        return saved, "cached"
    return saved, "prefill_busy" if prefill.prompt_tokens >= tokens else "short"


def prompts_s(engine: Prospect, tokens: float, budget: int) -> float:
    """Seconds for the prompts before this one, and for what is missing of it."""
    times, missing = engine.work.times, max(1.0, tokens - engine.cached)
    before = times.prompt_s(engine.prompt_tokens, 0, budget) if engine.prompt_tokens else 0.0
    return before + times.prompt_s(missing, engine.cached, budget)


def _decode_s(engine: Prospect) -> float:
    """Seconds of its next step without prompts, with one sequence at least."""
    step = _decodes(engine)
    return engine.work.times.seconds(step if step.decodes else Step(1, 0, 1, 0, 1))


def _decodes(engine: Prospect) -> Step:
    """Its decodes now, with the mean context of its last report."""
    count, work = max(0.0, engine.decodes), engine.work
    context = work.context / work.decodes if work.decodes else 0.0
    return Step(count, 0.0, count, count * context, count)
