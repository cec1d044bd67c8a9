"""Prefill and decode speed of the engine's scheduler and runner on the CPU, in process CPU time.

    python -m benchmarks.cpu_speed [--model gemma-3-270m] [--dtype float32] [--rounds 3] [--prefill 128,512,1500]
        [--decode 1,8,32] [--chunk 2048] [--attention native|gather] [--mix]

Tokens per second of one thread: the fastest of `rounds` prompts, and of the steps of a batch. CPU time and minima,
because other processes share the machine. Prints one JSON line. To compare two trees, run it in each by turns.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time

import torch

from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.cache.kv_pool import KvPool
from pdctl.engine.cache.layout import block_bytes
from pdctl.engine.cache.memory import Memory
from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.model.attention import open_backend
from pdctl.engine.model.loading import load_model
from pdctl.engine.model.runner import ModelRunner
from pdctl.engine.schedule.batch import Limits
from pdctl.engine.schedule.scheduler import Scheduler
from pdctl.engine.schedule.sequence import Sequence
from pdctl.host.models import locate_model
from pdctl.host.users import cache_root
from pdctl.wire import Manifest

_BLOCK = 16
_CONTEXT = 128


def main() -> int:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_speed")
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--chunk", type=int, default=2048, help="tokens per step")
    parser.add_argument("--prefill", default="128,512,1500")
    parser.add_argument("--decode", default="1,8,32")
    parser.add_argument("--attention", default="native", choices=["native", "gather"])
    parser.add_argument("--mix", action="store_true", help="also 64 requests at once, of mixed lengths")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = locate_model(f"sample:{options.model}", cache_root()).path
    runner = _runner(path, getattr(torch, options.dtype), options.attention)
    runner.self_check()
    found: dict[str, float] = {}
    for length in _numbers(options.prefill):
        seconds = min(_prefill(runner, length, options.chunk) for _ in range(options.rounds))
        found[f"prefill {length}"] = round(length / seconds)
    for batch in _numbers(options.decode):
        found[f"decode {batch}"] = round(batch / _decode(runner, batch, options.steps), 1)
    if options.mix:
        found["mix of 64"] = _mix(runner)
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


def _runner(path: str, dtype: torch.dtype, attention: str) -> ModelRunner:
    device = torch.device("cpu")
    loaded = load_model(path, device, dtype, cache_root() / "products")
    manifest = Manifest(loaded.fingerprint, loaded.dtype, _BLOCK, loaded.shapes)
    blocks = 64 * (512 + 64) // _BLOCK
    pool = KvPool(manifest, blocks, Memory(block_bytes(manifest) * blocks, "bench"), device)
    return ModelRunner(loaded, pool, device, backend=open_backend(attention, device))


def _scheduler(runner: ModelRunner, chunk: int) -> Scheduler:
    return Scheduler(Limits(64, chunk, 8192, _BLOCK, frozenset()), BlockAllocator(runner.pool.num_blocks))


def _add(scheduler: Scheduler, runner: ModelRunner, name: str, length: int, tokens: int) -> None:
    ids = torch.randint(5, runner.loaded.vocab_size, (length,), generator=torch.Generator().manual_seed(3)).tolist()
    assert scheduler.add(Sequence(name, ids, length, Sampling(tokens, temperature=0.0, ignore_eos=True))) is None


def _step(runner: ModelRunner, scheduler: Scheduler) -> float:
    """CPU seconds of one step, scheduling included."""
    started = time.process_time()
    batch = scheduler.schedule()
    scheduler.update(batch, *runner.execute(batch))
    return time.process_time() - started


def _prefill(runner: ModelRunner, length: int, chunk: int) -> float:
    scheduler = _scheduler(runner, chunk)
    _add(scheduler, runner, "prompt", length, 1)
    seconds = 0.0
    while scheduler.has_work:
        seconds += _step(runner, scheduler)
    return seconds


def _decode(runner: ModelRunner, batch: int, steps: int) -> float:
    scheduler = _scheduler(runner, 2048)
    for index in range(batch):
        _add(scheduler, runner, str(index), _CONTEXT, 2 * steps)
    while any(sequence.num_missing > 1 for sequence in scheduler.sequences.values()):
        _step(runner, scheduler)
    return min(_step(runner, scheduler) for _ in range(steps))


def _mix(runner: ModelRunner) -> float:
    """Tokens per CPU second of 64 requests at once, prompts included."""
    scheduler, chance = _scheduler(runner, 2048), random.Random(7)
    shapes = [(chance.randint(64, 512), chance.randint(16, 64)) for _ in range(64)]
    for number, (length, tokens) in enumerate(shapes):
        _add(scheduler, runner, str(number), length, tokens)
    seconds = 0.0
    while scheduler.has_work:
        seconds += _step(runner, scheduler)
    return round(sum(map(sum, shapes)) / seconds, 1)


if __name__ == "__main__":
    raise SystemExit(main())
