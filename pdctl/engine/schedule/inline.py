"""How many tokens of prompts fit into a step beside sequences that decode, so that these keep their target.

Each token of a sequence is due one TPOT after the one before it, counted from its first: tokens that came early give
slack, which a chunk may use (the closed form is in `pdctl.latency.StepTimes.chunk`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Ordered

from pdctl.engine.schedule.batch import Limits, Slice
from pdctl.engine.schedule.sequence import Pace, Sequence
from pdctl.latency import StepTimes, step_of

# Prompts get at least so much of a step as its decodes: where these alone miss their target, or nearly, there is no
# target to protect, and prompts must get on.
_LEAST = 2.0


def prompt_tokens(
    decodes: Ordered[Slice], partial: Iterable[Sequence], times: StepTimes, limits: Limits, now: float
) -> int:
    """The tokens of prompts that a step with these decodes may compute; at least a block's. `partial`: prompts that are
    computed in part."""
    due = min((_due(piece.sequence, now) for piece in decodes), default=math.inf) if limits.keeps_tpot else math.inf
    if due == math.inf:
        return limits.max_num_batched_tokens
    step = step_of((piece.count, piece.start) for piece in decodes)
    limit_s = max(due - now, _LEAST * times.seconds(step))
    before = max((sequence.num_computed for sequence in partial), default=0)
    return max(times.chunk(step, before, limit_s), limits.block_size)


def _due(sequence: Sequence, now: float) -> float:
    # One that came from a peer has had no token here yet.
    return (sequence.pace or Pace(now, now)).due(sequence.tpot_s) if sequence.tpot_s else math.inf
