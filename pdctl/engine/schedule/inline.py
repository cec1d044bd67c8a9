"""How many tokens of prompts fit into a step beside sequences that decode, so that these keep their target.

Each token of a sequence is due one TPOT after the one before it, counted from its first: tokens that came early give
slack, which a chunk may use (the closed form is in `pdctl.latency.StepTimes.chunk`).

A sequence that a peer hands over can come at any moment, and then waits for the running step. So where sequences are
handed over, a chunk with nothing beside it is bounded as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Ordered

from pdctl.engine.schedule.batch import Limits, Slice
from pdctl.engine.schedule.sequence import Sequence
from pdctl.latency import ARRIVAL_WAIT, LEAST_STEP, StepTimes, step_of


def prompt_tokens(
    decodes: Ordered[Slice],
    partial: Iterable[Sequence],
    times: StepTimes,
    limits: Limits,
    now: float,
    arriving_tpot_s: float = 0.0,
) -> int:
    """The tokens of prompts that a step with these decodes may compute; at least a block's. `partial`: prompts that are
    computed in part; `arriving_tpot_s`: the target of sequences that a peer may hand over at any moment, 0: none."""
    due = min((_due(piece.sequence, now) for piece in decodes), default=math.inf) if limits.keeps_tpot else math.inf
    arrival_s = ARRIVAL_WAIT * arriving_tpot_s if limits.keeps_tpot and arriving_tpot_s else math.inf
    if min(due, arrival_s) == math.inf:
        return limits.max_num_batched_tokens
    step = step_of((piece.count, piece.start) for piece in decodes)
    least_s = LEAST_STEP * times.seconds(step) if decodes else 0.0
    limit_s = max(min(due - now, arrival_s), least_s)
    before = max((sequence.num_computed for sequence in partial), default=0)
    return max(times.chunk(step, before, limit_s), limits.block_size)


def _due(sequence: Sequence, now: float) -> float:
    if not sequence.tpot_s:
        return math.inf
    # One that came from a peer had its first token there, and its second is late already.
    return now if sequence.pace is None else sequence.pace.due(sequence.tpot_s)
