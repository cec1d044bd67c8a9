"""Steps of an engine over two processes against one process, and what their exchanges take at least.

python -m benchmarks.tensor_parallel [--model sample:NAME] [--rounds N]

The floor is measured in the same run, between two processes that do nothing else: as many sums and one join of as many
bytes as a step needs, over gloo. Everything is measured in turn, round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pdctl.engine.executor.ranks import RanksExecutor
from pdctl.engine.executor.single import SingleExecutor
from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.options import parse
from pdctl.engine.samples.prepare import prepare
from pdctl.engine.schedule.batch import Slice
from pdctl.engine.schedule.sequence import Sequence
from pdctl.host.models import locate_model
from pdctl.host.processor import cpu_name
from pdctl.host.users import cache_root

CONTEXT = 256

_FLOOR = """
import json, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
rank, meet, sums, rows, joined, hidden, vocab, rounds = int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
found = []
for _ in range(rounds):
    part, logits = torch.ones(rows, hidden), torch.ones(joined, vocab // 2)
    began = time.perf_counter()
    for _ in range(sums):
        dist.all_reduce(part)
    dist.all_gather([torch.empty_like(logits) for _ in range(2)], logits)
    found.append((time.perf_counter() - began) * 1e3)
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Shape:
    """What is exchanged in a step: a sum for the embeddings, and two for each layer; the logits are joined."""

    layers: int
    hidden: int
    vocab: int

    @property
    def sums(self) -> int:
        """Number of them."""
        return 1 + 2 * self.layers


def floor(shape: Shape, rows: int, joined: int, rounds: int) -> list[float]:
    """Milliseconds of the exchanges alone of a step with so many rows, `joined` of them with logits."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = map(str, (shape.sums, rows, joined, shape.hidden, shape.vocab, rounds))
        words = [f"{folder}/meet", *sizes]
        env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
        started = [
            subprocess.Popen([sys.executable, "-c", _FLOOR, str(rank), *words], stdout=subprocess.PIPE, env=env)
            for rank in (0, 1)
        ]
        first, _ = (process.communicate(timeout=600)[0] for process in started)
    return [float(found) for found in json.loads(first)]


def decodes(executor: SingleExecutor, rows: int, rounds: int) -> list[float]:
    """Milliseconds of decode steps of `rows` sequences with some context."""
    each = CONTEXT // 16 + 1
    batch = []
    for row in range(rows):
        blocks = list(range(row * each, (row + 1) * each))
        ids = [(index * 37 + row) % 300 + 3 for index in range(CONTEXT + 1)]
        sequence = Sequence(f"r{row}", ids, len(ids), Sampling(1, temperature=0.0), block_ids=blocks)
        batch.append(Slice(sequence, CONTEXT, 1, True))
    return [_ms(lambda: executor.execute(batch)) for _ in range(rounds)]


def prompt(executor: SingleExecutor, rounds: int) -> list[float]:
    """Milliseconds of a step with a prompt."""
    ids = [(index * 37) % 300 + 3 for index in range(CONTEXT)]
    sequence = Sequence("p", ids, len(ids), Sampling(1, temperature=0.0), block_ids=list(range(CONTEXT // 16)))
    return [_ms(lambda: executor.execute([Slice(sequence, 0, CONTEXT, True)])) for _ in range(rounds)]


def _ms(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3


def _shown(times: list[float]) -> str:
    return f"{min(times):8.2f} {statistics.median(times):8.2f}"


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="sample:tiny-qwen3")
    parser.add_argument("--rounds", type=int, default=40)
    given = parser.parse_args()
    path = prepare(given.model, locate_model(given.model, cache_root()).path, lambda *_: None)
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "--name",
            "b",
            "--model",
            path,
            "--port",
            "1",
            "--run-dir",
            folder,
            "--epoch",
            "e",
            "--dtype",
            "float32",
        ]
        words += ["--kv-cache-gb", "0.3"]
        single = SingleExecutor.load(parse(words))
        ranks = RanksExecutor.load_ranks(parse([*words, "--tensor-parallel", "2"]), lambda reason, _: print(reason))
        config = json.loads((Path(path) / "config.json").read_text())
        shape = Shape(config["num_hidden_layers"], config["hidden_size"], config["vocab_size"])
        print(f"{given.model} on {cpu_name()}, float32, one thread per process; milliseconds, least and median")
        print(f"{'step':<24} {'one process':>17} {'two ranks':>17} {'exchanges alone':>17}")
        for name, rows in (("1 decode", 1), ("8 decodes", 8), (f"prompt of {CONTEXT}", 0)):
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(4):
                for number, executor in enumerate((single, ranks)):
                    part = given.rounds // 4
                    times[number].extend(decodes(executor, rows, part) if rows else prompt(executor, part))
            alone = floor(shape, rows or CONTEXT, rows or 1, given.rounds)
            print(f"{name:<24} {_shown(times[0])} {_shown(times[1])} {_shown(alone)}")
        ranks.close()
        single.close()
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
