"""How well an engine predicts its steps: the latency model after its first start, on steps that it has not seen.

    python -m benchmarks.latency_model [--model gemma-3-270m] [--steps 40] [--clock cpu|wall] [--longest 4]

Steps of random sizes, `--steps` of each kind, computed by the engine's own executor. Prints one JSON object: by kind of
step, the mean and the 90th percentile of |predicted / actual - 1|, with the model as measured by the engine's warm-up,
and with the corrections that a running engine makes. `--clock cpu` leaves out what other processes of the machine take.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from pdctl.bench.measurements import percentile
from pdctl.engine.core.warm_up import batch_of, measured, shapes
from pdctl.engine.executor.single import SingleExecutor
from pdctl.engine.options import parse
from pdctl.engine.schedule.batch import Limits
from pdctl.engine.schedule.latency import LatencyModel
from pdctl.host.models import locate_model
from pdctl.host.users import cache_root
from pdctl.latency import KINDS, Kind, StepTimes, step_of

_CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


def main() -> int:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency_model")
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--steps", type=int, default=40, help="held-out steps of each kind")
    parser.add_argument("--clock", choices=list(_CLOCKS), default="cpu")
    parser.add_argument("--longest", type=float, default=4.0, help="seconds that the warm-up may take")
    options = parser.parse_args()
    clock = _CLOCKS[options.clock]
    with tempfile.TemporaryDirectory() as folder:
        path = locate_model(f"sample:{options.model}", cache_root()).path
        executor = SingleExecutor.load(parse(["--name", "bench", "--model", path, "--port", "1", "--run-dir", folder]))
        limits = Limits(16, 512, 2048, 16, frozenset())
        vocabulary = executor.loaded.vocab_size
        began = time.monotonic()
        model = measured(executor.execute, limits, executor.num_blocks, vocabulary, clock, options.longest)
        warm_up_s = time.monotonic() - began
        found = _errors(executor, limits, model, options.steps, clock)
    found |= {"warm_up_s": round(warm_up_s, 1), "clock": options.clock, "model": Path(path).name}
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    return 0


def _errors(
    executor: SingleExecutor, limits: Limits, model: LatencyModel, steps: int, clock: object
) -> dict[str, object]:
    assert callable(clock)
    first: StepTimes = model.times
    rng = random.Random(17)
    errors: dict[str, dict[Kind, list[float]]] = {name: {kind: [] for kind in KINDS} for name in ("first", "running")}
    while min(len(found) for found in errors["first"].values()) < steps:
        for shape in shapes(limits, executor.num_blocks, rng):
            step = step_of(shape)
            if len(errors["first"][step.kind]) == steps:
                continue
            batch = batch_of(shape, limits.block_size, executor.num_blocks, executor.loaded.vocab_size, rng)
            began = clock()
            executor.execute(batch)
            seconds = clock() - began
            errors["first"][step.kind].append(abs(first.seconds(step) / seconds - 1))
            errors["running"][step.kind].append(abs(model.times.seconds(step) / seconds - 1))
            model.took(step, seconds)
    return {
        name: {
            kind: {"mean": round(statistics.fmean(values), 3), "p90": round(percentile(values, 90), 3)}
            for kind, values in kinds.items()
        }
        for name, kinds in errors.items()
    }


if __name__ == "__main__":
    raise SystemExit(main())
