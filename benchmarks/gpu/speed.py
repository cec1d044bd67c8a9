"""Prefill and decode speed of the engine's scheduler and runner on one shape, as fractions of the device's limits.

    python -m benchmarks.gpu.speed --shape 8B [--device cuda] [--attention auto] [--peer]

Prints one JSON line. `--peer`: also transformers' `generate_batch` on the same weights, before the engine. Each
measurement that fails has an `error`, and the next ones are made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch

from benchmarks.gpu.limits import copy_bytes_per_second, matrix_flops_per_second
from benchmarks.gpu.models import SHAPES, Weights, make
from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.cache.kv_pool import DTYPES, KvPool
from pdctl.engine.cache.layout import block_bytes
from pdctl.engine.cache.memory import Memory
from pdctl.engine.executor.launches import Launches
from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.model.attention.batch import PoolNeed
from pdctl.engine.model.attention.choice import choose
from pdctl.engine.model.graphs import CudaRecorder, GraphsRefused
from pdctl.engine.model.loading import hook_model
from pdctl.engine.model.runner import ModelRunner
from pdctl.engine.schedule.batch import Limits
from pdctl.engine.schedule.scheduler import Scheduler
from pdctl.engine.schedule.sequence import Sequence
from pdctl.names.attention import ATTENTION_NAMES
from pdctl.wire import Manifest

_PROMPT = 128
_STEPS = 24
_BATCHES = (1, 8, 32, 128)
_LENGTHS = (512, 2048, 8192)
_BLOCK = 16
_MODEL_LEN = 16384


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
    parser.add_argument("--attention", choices=ATTENTION_NAMES, default="auto")
    parser.add_argument("--block-size", type=int, default=_BLOCK)
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--peer", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    copy, flops = copy_bytes_per_second(device), matrix_flops_per_second(device, dtype)
    weights = make(options.shape, device, dtype)
    peer = [_peer(weights, batch, device) for batch in _BATCHES[1::2]] if options.peer else []
    runner, attention = _runner(weights, device, options.attention, options.block_size)
    bench = Bench(weights, runner, device, copy, flops)
    found: dict[str, Any] = {
        "shape": options.shape,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "attention": attention,
        "copy_gb_per_s": round(copy / 1e9),
        "matrix_tflops": round(flops / 1e12, 1),
        "peer": peer,
    }
    found["self_check"] = _kept(partial(_self_check, bench))
    found["decode_eager"] = [_kept(partial(decode, bench, batch), batch=batch) for batch in _BATCHES[::3]]
    found["graphs"] = "off" if options.eager else _capture(bench)
    found["decode"] = [_kept(partial(decode, bench, batch), batch=batch) for batch in _BATCHES]
    found["decode_ahead"] = [_kept(partial(decode, bench, batch, ahead=True), batch=batch) for batch in _BATCHES]
    found["prefill"] = [_kept(partial(prefill, bench, length), tokens=length) for length in _LENGTHS]
    sys.stdout.write(json.dumps(found) + "\n")
    made = (found["self_check"], *found["decode"], *found["decode_ahead"], *found["prefill"])
    failed = any("error" in entry for entry in made)
    return 1 if failed else 0


def _self_check(bench: Bench) -> dict[str, Any]:
    bench.runner.self_check()
    return {"agrees": True}


def _kept(measure: Callable[[], dict[str, Any]], **about: int) -> dict[str, Any]:
    """The measurement, or its error: what fails does not take the others with it."""
    try:
        return measure()
    except Exception as failure:  # noqa: BLE001 - reported
        return {**about, "error": f"{type(failure).__name__}: {failure}"[:300]}


def _runner(weights: Weights, device: torch.device, attention: str, block_size: int) -> tuple[ModelRunner, str]:
    loaded = hook_model(weights.module, "random", frozenset(), "random")
    manifest = Manifest(loaded.fingerprint, loaded.dtype, block_size, loaded.shapes)
    chosen = choose(attention, loaded.needs, PoolNeed(DTYPES[loaded.dtype], block_size), device)
    tokens = max(_LENGTHS[-1], _BATCHES[-1] * (_PROMPT + 2 * _STEPS + block_size))
    # The last block is nobody's: the padding of graphs writes there.
    blocks = tokens // block_size + 64 + 1
    memory = Memory(block_bytes(manifest) * blocks, "bench") if device.type == "cpu" else None
    pool = KvPool(manifest, blocks, memory, device)
    return ModelRunner(loaded, pool, device, backend=chosen.backend), f"{chosen.backend.name}: {chosen.reason}"


def _capture(bench: Bench) -> str:
    if bench.device.type != "cuda":
        return "off: not a GPU"
    started = time.perf_counter()
    try:
        recorder, last = CudaRecorder(bench.device), bench.runner.pool.num_blocks - 1
        sizes = bench.runner.capture(_BATCHES[-1], 2048, last, recorder)
    except (GraphsRefused, RuntimeError) as failure:
        return f"off: {failure}"[:300]
    return f"{len(sizes)} sizes up to {max(sizes, default=0)} in {time.perf_counter() - started:.1f} s"


def _scheduler(bench: Bench) -> Scheduler:
    limits = Limits(_BATCHES[-1], _LENGTHS[-1], _MODEL_LEN, bench.runner.pool.block_size, frozenset())
    return Scheduler(limits, BlockAllocator(bench.runner.pool.num_blocks - 1))


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


def _steps_ahead(bench: Bench, scheduler: Scheduler) -> list[float]:
    """Seconds of each step, if the next one is launched while it computes, as the core's loop does."""
    launches = Launches(bench.runner, in_thread=bench.device.type == "cpu")
    flight = launches.launch(scheduler.schedule())
    times = []
    for _ in range(_STEPS):
        started = time.perf_counter()
        following = scheduler.schedule_ahead(flight.batch)
        if not following:
            raise RuntimeError(f"no step can be launched ahead: {scheduler.ahead.asked}")
        ahead = launches.launch(following, flight)
        scheduler.update(flight.batch, *flight.finish())
        times.append(time.perf_counter() - started)
        flight = ahead
    # The last one still computes.
    scheduler.update(flight.batch, *flight.finish())
    launches.close()
    return times


def decode(bench: Bench, batch: int, ahead: bool = False) -> dict[str, float]:
    """Tokens per second with `batch` streams, and this as a fraction of the memory bandwidth limit. `ahead`: each step
    is scheduled and launched while the one before it computes."""
    scheduler = _scheduler(bench)
    _add(scheduler, batch, _PROMPT, 2 * _STEPS, bench.runner.loaded.vocab_size)
    while any(s.num_missing > 1 for s in scheduler.sequences.values()):
        _step(bench, scheduler)
    times = _steps_ahead(bench, scheduler) if ahead else [_step(bench, scheduler) for _ in range(_STEPS)]
    step = statistics.median(times[4:])
    needed = bench.weights.bytes_read + batch * (_PROMPT + _STEPS) * bench.weights.kv_bytes_per_token
    replay = _replay_seconds(bench, batch)
    host = {} if replay is None else {"gpu_ms": round(replay * 1e3, 3), "python_share": round(1 - replay / step, 3)}
    return {
        **host,
        "batch": batch,
        "tokens_per_s": round(batch / step, 1),
        "step_ms": round(step * 1e3, 3),
        "of_bandwidth": round(needed / bench.copy / step, 3),
    }


def _replay_seconds(bench: Bench, batch: int) -> float | None:
    """Seconds of the step's graph alone, replayed without anything between; None without a graph."""
    replay = bench.runner.replay_of(batch)
    if replay is None:
        return None
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(_STEPS):
        replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / _STEPS


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
