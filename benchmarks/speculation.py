"""Decode speed with and without guessed tokens (n-grams), by turns in one run, in process CPU time of one thread.

    python -m benchmarks.speculation [--model gemma-3-270m] [--dtype float32] [--rounds 3] [--batches 1,4,16]
        [--tokens 64] [--guesses 4]

Two kinds of prompts, from a real text: `repeats` ends with the beginning of its own passage once more, so that the
model copies the rest; `new` is a passage that is continued at temperature 1. Prints, for each kind and batch, the
tokens per CPU second without and with guesses (median of the rounds), their ratio, the tokens that one step gave a
sequence, and the part of the guesses that was right. Fails if an output differs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from benchmarks.cpu_speed import _numbers, _runner
from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.core.warm_up import measured
from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.model.runner import ModelRunner
from pdctl.engine.schedule.batch import Limits
from pdctl.engine.schedule.latency import LatencyModel
from pdctl.engine.schedule.scheduler import Scheduler
from pdctl.engine.schedule.sequence import Sequence
from pdctl.host.models import locate_model
from pdctl.host.users import cache_root
from pdctl.speculative import Speculative
from tests.e2e.parity import prompts

_PASSAGE, _AGAIN = 120, 30


def main() -> int:
    """Prints a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speculation")
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--attention", default="native", choices=["native", "gather"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--guesses", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = locate_model(f"sample:{options.model}", cache_root()).path
    runner = _runner(path, getattr(torch, options.dtype), options.attention)
    limits = Limits(64, 512, 2048, runner.pool.block_size, frozenset())
    # As an engine does at its first start.
    latency = measured(runner.execute, limits, runner.pool.num_blocks, runner.loaded.vocab_size, time.process_time)
    print(f"{options.model}, {options.dtype}, {options.tokens} tokens, up to {options.guesses} guesses")
    print("prompts  batch   plain  guessing  ratio  tokens/step  right")
    settings = Speculative("ngram", options.guesses)
    for kind in ("repeats", "new"):
        for batch in _numbers(options.batches):
            passages = prompts(Path(path), (_PASSAGE,) * batch)
            wanted = [[*passage, *passage[:_AGAIN]] if kind == "repeats" else passage for passage in passages]
            hot = 0.0 if kind == "repeats" else 1.0
            plain, guessing = [], []
            for _ in range(options.rounds):
                plain.append(_decode(runner, wanted, options.tokens, hot, latency, None))
                guessing.append(_decode(runner, wanted, options.tokens, hot, latency, settings))
                assert plain[-1].outputs == guessing[-1].outputs, "a guess has changed an output"
            _row(kind, batch, options.tokens, plain, guessing)
    return 0


class Decoded:
    """The decode steps of one batch: outputs, CPU seconds, and counts of steps of one sequence and of guesses."""

    def __init__(self, outputs: dict[str, list[int]], seconds: float, steps: int, drafted: int, accepted: int) -> None:
        self.outputs = outputs
        self.seconds = seconds
        self.steps = steps
        self.drafted = drafted
        self.accepted = accepted


def _row(kind: str, batch: int, tokens: int, plain: list[Decoded], guessing: list[Decoded]) -> None:
    # The first token comes with the prompt.
    count = batch * (tokens - 1)
    speeds = [statistics.median(count / run.seconds for run in runs) for runs in (plain, guessing)]
    ratio = statistics.median(a.seconds / b.seconds for a, b in zip(plain, guessing, strict=True))
    run = guessing[0]
    right = run.accepted / run.drafted if run.drafted else 0.0
    print(
        f"{kind:8s} {batch:5d} {speeds[0]:7.1f} {speeds[1]:9.1f} {ratio:6.2f} {count / run.steps:12.2f} {right:6.0%}",
        flush=True,
    )


def _decode(
    runner: ModelRunner,
    wanted: list[list[int]],
    tokens: int,
    temperature: float,
    latency: LatencyModel,
    settings: Speculative | None,
) -> Decoded:
    limits = Limits(64, 4096, 8192, runner.pool.block_size, frozenset())
    scheduler = Scheduler(limits, BlockAllocator(runner.pool.num_blocks), latency, speculative=settings)
    for index, prompt in enumerate(wanted):
        sampling = Sampling(tokens, temperature=temperature, seed=index, ignore_eos=True)
        assert scheduler.add(Sequence(str(index), list(prompt), len(prompt), sampling)) is None
    outputs: dict[str, list[int]] = {str(index): [] for index in range(len(wanted))}
    seconds, steps = 0.0, 0
    while scheduler.has_work:
        began = time.process_time()
        batch = scheduler.schedule()
        outcome = scheduler.update(batch, *runner.execute(batch))
        took = time.process_time() - began
        scheduler.took(batch, took)
        if all(piece.count == 1 for piece in batch):
            seconds += took
            steps += len(batch)
        for token in outcome.tokens:
            outputs[token.request_id].append(token.token_id)
    books = scheduler.books(0)
    return Decoded(outputs, seconds, steps, books.drafted, books.accepted)


if __name__ == "__main__":
    raise SystemExit(main())
