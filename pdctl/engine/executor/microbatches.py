"""Cuts a step of stages into microbatches, so that each stage computes one while the next stage computes the one
before: the pipeline of GPipe (Huang et al., 2019, https://arxiv.org/abs/1811.06965). Pure.

Only prompts are cut: decode steps read all weights for a few rows, and would read them again for each part. Everything
that yields a token is in the last microbatch, so the first stage waits only once in a step, when the last stage gives
its rows back. By then every stage has computed the whole step: whoever reads its results sees one step, as without
this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pdctl.engine.schedule.batch import Slice

# With fewer rows a product costs hardly less (docs/performance.md). The pipeline's idle part is
# (stages - 1) / (number + stages - 1): more microbatches make it smaller, but each costs a pass; more were no faster.
_FEWEST_ROWS, _MOST_EACH = 128, 2


def microbatches(batch: list[Slice], stages: int) -> list[list[Slice]]:
    """The parts of a step, in the order of computation; only slices of the last one sample."""
    rows = sum(piece.num_rows for piece in batch)
    number = min(rows // _FEWEST_ROWS, _MOST_EACH * stages)
    # Rows of log probabilities are numbered by the whole step.
    if stages == 1 or number < 2 or any(piece.sequence.lacks_prompt_logprobs for piece in batch):
        return [batch]
    share = -(-rows // number)
    early, last = _cut(batch, rows - share)
    found = []
    while early:
        part, early = _cut(early, share)
        found.append(part)
    return [*found, last]


def _cut(batch: Sequence[Slice], rows: int) -> tuple[list[Slice], list[Slice]]:
    """Up to so many of the first rows that yield nothing, and the rest."""
    first, rest = [], []
    for piece in batch:
        count = min(rows, piece.count - piece.samples)
        rows -= count
        if count:
            first.append(replace(piece, count=count, samples=False, drafts=()))
        if count < piece.num_rows:
            rest.append(replace(piece, start=piece.start + count, count=piece.count - count))
    return first, rest
