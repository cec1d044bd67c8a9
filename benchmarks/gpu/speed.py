"""Prefill and decode speed of the engine's scheduler and runner on one shape, as fractions of the device's limits.

    python -m benchmarks.gpu.speed --shape 8B [--device cuda] [--peer]

Prints one JSON line. `--peer`: also transformers' `generate_batch` on the same weights, after the engine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch

from benchmarks.gpu.limits import copy_bytes_per_second, matrix_flops_per_second
from benchmarks.gpu.models import SHAPES, Weights, make
from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.cache.kv_pool import KvPool
from pdctl.engine.cache.layout import block_bytes
from pdctl.engine.cache.memory import Memory
from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.model.loading import hook_model
from pdctl.engine.model.runner import ModelRunner
from pdctl.engine.schedule.batch import Limits
from pdctl.engine.schedule.scheduler import Scheduler
from pdctl.engine.schedule.sequence import Sequence
from pdctl.wire import Manifest

_PROMPT = 128
_STEPS = 24
_BATCHES = (1, 8, 32, 128)
_LENGTHS = (512, 2048, 8192)
_BLOCK = 16


@dataclass(frozen=True, slots=True)
class Bench:
    """One model with one pool, and the device's limits."""

    weights: Weights
    runner: ModelRunner
    device: torch.device
    copy: float
    flops: float


def main() -> int:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.speed")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--peer", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    copy, flops = copy_bytes_per_second(device), matrix_flops_per_second(device, dtype)
    weights = make(options.shape, device, dtype)
    peer = [_peer(weights, batch, device) for batch in _BATCHES[1::2]] if options.peer else []
    bench = Bench(weights, _runner(weights, device), device, copy, flops)
    bench.runner.self_check()
    found = {
        "shape": options.shape,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "copy_gb_per_s": round(copy / 1e9),
        "matrix_tflops": round(flops / 1e12, 1),
        "decode": [decode(bench, batch) for batch in _BATCHES],
        "prefill": [prefill(bench, length) for length in _LENGTHS],
        "peer": peer,
    }
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


def _runner(weights: Weights, device: torch.device) -> ModelRunner:
    loaded = hook_model(weights.module, "random", frozenset(), "random")
    manifest = Manifest(loaded.fingerprint, loaded.dtype, _BLOCK, loaded.shapes)
    blocks = max(_LENGTHS[-1], _BATCHES[-1] * (_PROMPT + 2 * _STEPS)) // _BLOCK + 64
    memory = Memory(block_bytes(manifest) * blocks, "bench") if device.type == "cpu" else None
    pool = KvPool(manifest, blocks, memory, device)
    return ModelRunner(loaded, pool, device)


def _scheduler(bench: Bench) -> Scheduler:
    limits = Limits(_BATCHES[-1], _LENGTHS[-1], 16384, _BLOCK, frozenset())
    return Scheduler(limits, BlockAllocator(bench.runner.pool.num_blocks))


def _add(scheduler: Scheduler, count: int, length: int, tokens: int, vocab: int) -> None:
    generator = torch.Generator().manual_seed(count)
    for index in range(count):
        ids = torch.randint(5, vocab, (length,), generator=generator).tolist()
        sampling = Sampling(tokens, temperature=0.0, ignore_eos=True)
        assert scheduler.add(Sequence(str(index), ids, length, sampling)) is None


def _step(bench: Bench, scheduler: Scheduler) -> float:
    """Seconds of one step, scheduling included: `execute` ends with the tokens on the host."""
    started = time.perf_counter()
    batch = scheduler.schedule()
    scheduler.update(batch, *bench.runner.execute(batch))
    return time.perf_counter() - started


def decode(bench: Bench, batch: int) -> dict[str, float]:
    """Tokens per second with `batch` streams, and this as a fraction of the memory bandwidth limit."""
    scheduler = _scheduler(bench)
    _add(scheduler, batch, _PROMPT, 2 * _STEPS, bench.runner.loaded.vocab_size)
    while any(s.num_missing > 1 for s in scheduler.sequences.values()):
        _step(bench, scheduler)
    times = [_step(bench, scheduler) for _ in range(_STEPS)]
    step = statistics.median(times[4:])
    needed = bench.weights.bytes_read + batch * (_PROMPT + _STEPS) * bench.weights.kv_bytes_per_token
    return {
        "batch": batch,
        "tokens_per_s": round(batch / step, 1),
        "step_ms": round(step * 1e3, 3),
        "of_bandwidth": round(needed / bench.copy / step, 3),
    }


def prefill(bench: Bench, length: int) -> dict[str, float]:
    """Tokens per second of one prompt computed in one step, and this as a fraction of the matrix rate limit."""
    times = []
    for _ in range(5):
        scheduler = _scheduler(bench)
        _add(scheduler, 1, length, 1, bench.runner.loaded.vocab_size)
        times.append(_step(bench, scheduler))
    step = statistics.median(times[1:])
    needed = 2 * bench.weights.matrix_params * length + bench.weights.attention_flops_per_pair * length * length / 2
    return {
        "tokens": length,
        "tokens_per_s": round(length / step),
        "ms": round(step * 1e3, 2),
        "of_matrix_rate": round(needed / bench.flops / step, 3),
    }


def _peer(weights: Weights, batch: int, device: torch.device) -> dict[str, float | str]:
    """transformers' continuous batching: the seconds for additional tokens, from answers of two lengths."""
    from transformers import GenerationConfig

    generator = torch.Generator().manual_seed(batch)
    vocab = cast(int, weights.module.config.vocab_size)  # type: ignore[union-attr]  # of transformers, untyped
    prompts = [torch.randint(5, vocab, (_PROMPT,), generator=generator).tolist() for _ in range(batch)]

    def run(tokens: int) -> float:
        config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        started = time.perf_counter()
        generate = cast(Callable[..., dict[str, Any]], weights.module.generate_batch)
        found = generate(inputs=prompts, generation_config=config, progress_bar=False)
        took = time.perf_counter() - started
        if sum(len(answer.generated_tokens) for answer in found.values()) != batch * tokens:
            raise RuntimeError("generate_batch did not answer every prompt in full")
        return took

    try:
        with torch.no_grad():
            run(8)
            step = (min(run(72), run(72)) - min(run(8), run(8))) / 64
    except (RuntimeError, ValueError, TypeError, ImportError, AttributeError) as failure:
        return {"batch": batch, "error": f"{type(failure).__name__}: {failure}"[:300]}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {"batch": batch, "tokens_per_s": round(batch / step, 1), "step_ms": round(step * 1e3, 3)}


if __name__ == "__main__":
    raise SystemExit(main())
