"""Measures an engine that has no latency model yet: a few seconds of steps of many sizes, before it serves."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.schedule.batch import Limits, Slice
from pdctl.engine.schedule.latency import LatencyModel
from pdctl.engine.schedule.sequence import Sequence
from pdctl.latency import step_of

# Steps of each kind, and the time for all. A step that is predicted to take more than a part of it is left out.
STEPS_EACH = 24
_LONGEST_S = 4.0
_PART = 0.1
# Sizes that are measured, at most: longer ones follow the same line.
_MOST_SEQUENCES = 32
_MOST_CONTEXT = 2048

# (tokens, tokens before them) of each sequence of a step.
Shape = list[tuple[int, int]]


def measured(
    execute: Callable[[list[Slice]], object],
    limits: Limits,
    num_blocks: int,
    vocab_size: int,
    clock: Callable[[], float] = time.monotonic,
    longest_s: float = _LONGEST_S,
) -> LatencyModel:
    """A model fitted to steps that `execute` computes. They write to any block of the pool: no sequence may have one
    yet."""
    rng = random.Random(0)  # noqa: S311 - sizes, not secrets
    model, end, kinds = LatencyModel(), clock() + longest_s, set()
    for shape in shapes(limits, num_blocks, rng):
        step = step_of(shape)
        is_new = step.kind not in kinds
        if clock() > end:
            break
        if model.is_fitted and not is_new and model.times.seconds(step) > _PART * longest_s:
            continue
        batch = batch_of(shape, limits.block_size, num_blocks, vocab_size, rng)
        if is_new:
            # The first one also allocates and compiles.
            execute(batch)
            kinds.add(step.kind)
        began = clock()
        execute(batch)
        model.took(step, max(clock() - began, 1e-9))
    return LatencyModel(model.measured)


def shapes(limits: Limits, num_blocks: int, rng: random.Random) -> Iterator[Shape]:
    """Steps of all kinds by turns, small and large ones mixed, that this engine could be asked for."""
    # One token less: a decode's own token needs a place, too.
    context = min(_MOST_CONTEXT, limits.max_model_len - 1, num_blocks * limits.block_size - 1)
    most = min(_MOST_SEQUENCES, limits.max_num_seqs)

    def decodes(most: int) -> Shape:
        return [(1, rng.randint(1, context)) for _ in range(rng.randint(1, most))]

    def prompt(budget: int) -> tuple[int, int]:
        longest = max(2, min(budget, context))
        count = max(2, round(longest ** rng.uniform(0.3, 1.0)))
        return count, rng.randint(0, max(0, context - count)) if rng.random() < 0.5 else 0

    budget = limits.max_num_batched_tokens
    for _ in range(STEPS_EACH):
        yield [prompt(budget)]
        yield decodes(most)
        beside = decodes(max(1, min(most, budget - 2) // 2))
        yield [*beside, prompt(max(2, budget - len(beside)))]


def batch_of(shape: Shape, block_size: int, num_blocks: int, vocab_size: int, rng: random.Random) -> list[Slice]:
    """The slices of a step. Sequences share blocks where the pool is small: nobody reads the results."""
    batch, first = [], 0
    for number, (count, before) in enumerate(shape):
        needed = -(-(before + count) // block_size)
        blocks = [(first + index) % num_blocks for index in range(needed)]
        first += needed
        ids = rng.choices(range(vocab_size), k=before + count)
        sampling = Sampling(1, temperature=0.0, ignore_eos=True)
        sequence = Sequence(f"warm-up {number}", ids, len(ids), sampling, num_computed=before, block_ids=blocks)
        batch.append(Slice(sequence, before, count, samples=True))
    return batch
