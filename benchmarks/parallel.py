"""Steps of an engine over two processes against one process, and what their exchanges take at least.

python -m benchmarks.parallel [--by tensor|pipeline|sequence] [--model sample:NAME] [--rounds N]

The floor is measured in the same run, between two processes that do nothing else: the exchanges of a step, of as many
bytes, over gloo. Everything is measured in turn, round by round.
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
from pdctl.engine.model.parallel.stripes import FEWEST_ROWS
from pdctl.engine.options import parse
from pdctl.engine.samples.prepare import prepare
from pdctl.engine.schedule.batch import Slice
from pdctl.engine.schedule.sequence import Sequence
from pdctl.host.models import locate_model
from pdctl.host.processor import cpu_name
from pdctl.host.users import cache_root

CONTEXT = 256
PROMPTS = (256, 1024)

_FLOOR = """
import json, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
rank, meet, exchanges, rounds = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
def ring(part):
    if rank == 0:
        dist.send(part, 1)
        dist.recv(part, 1)
    else:
        dist.recv(part, 0)
        dist.send(part, 0)
ways = {
    "sum": dist.all_reduce, "ring": ring,
    "gather": lambda part: dist.all_gather([torch.empty_like(part) for _ in range(2)], part),
}
found = []
for _ in range(rounds):
    parts = [(ways[kind], torch.ones(rows, size), count) for kind, rows, size, count in exchanges]
    began = time.perf_counter()
    for way, part, count in parts:
        for _ in range(count):
            way(part)
    found.append((time.perf_counter() - began) * 1e3)
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. `kv`: numbers of one token's keys and values in a layer."""

    layers: int
    hidden: int
    vocab: int
    kv: int

    def exchanges(self, by: str, rows: int, kept: int) -> list[tuple[str, int, int, int]]:
        """(kind, rows, numbers in each, how often) of a step with so many rows, `kept` of them with logits."""
        if by == "tensor":
            # For the embeddings, and two in each layer; the logits are joined.
            return [("sum", rows, self.hidden, 1 + 2 * self.layers), ("gather", kept, self.vocab // 2, 1)]
        if by == "pipeline":
            return [("ring", rows, self.hidden, 1)]
        if rows < 2 * FEWEST_ROWS:
            return [("gather", 1, 1, 1)]
        return [("gather", rows // 2, self.kv, self.layers), ("gather", kept, self.vocab, 1)]


def floor(exchanges: list[tuple[str, int, int, int]], rounds: int) -> list[float]:
    """Milliseconds of the exchanges of a step alone."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"{folder}/meet", json.dumps(exchanges), str(rounds)]
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


def prompt(executor: SingleExecutor, tokens: int, rounds: int) -> list[float]:
    """Milliseconds of a step with a prompt."""
    ids = [(index * 37) % 300 + 3 for index in range(tokens)]
    sequence = Sequence("p", ids, len(ids), Sampling(1, temperature=0.0), block_ids=list(range(tokens // 16)))
    return [_ms(lambda: executor.execute([Slice(sequence, 0, tokens, True)])) for _ in range(rounds)]


def uncut(executor: SingleExecutor, tokens: int, rounds: int) -> list[float]:
    """The same, but stages compute the whole prompt one after the other."""
    assert isinstance(executor, RanksExecutor)
    stages, executor._stages = executor._stages, 1
    try:
        return prompt(executor, tokens, rounds)
    finally:
        executor._stages = stages


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
    parser.add_argument("--by", choices=["tensor", "pipeline", "sequence"], default="tensor")
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
        wide = parse([*words, f"--{given.by}-parallel", "2"])
        ranks = RanksExecutor.load_ranks(wide, lambda reason, _: print(reason))
        config = json.loads((Path(path) / "config.json").read_text())
        layer = single.manifest.layers[0]
        kv = layer.kv_heads * (layer.key_dim + layer.value_dim)
        shape = Shape(config["num_hidden_layers"], config["hidden_size"], config["vocab_size"], kv)
        print(f"{given.model} on {cpu_name()}, float32, one thread per process; {given.by}_parallel = 2")
        print("milliseconds, least and median")
        print(f"{'step':<24} {'one process':>17} {'two ranks':>17} {'exchanges alone':>17}")
        steps: list[tuple[str, Callable[[SingleExecutor, int, int], list[float]], int, int]]
        steps = [(f"{rows} decodes", decodes, rows, rows) for rows in (1, 8)]
        steps += [(f"prompt of {tokens}", prompt, tokens, 1) for tokens in PROMPTS]
        for name, work, rows, kept in steps:
            times: list[list[float]] = [[], [], []]
            for _ in range(4):
                part = given.rounds // 4
                times[0].extend(work(single, rows, part))
                times[1].extend(work(ranks, rows, part))
                if given.by == "pipeline" and work is prompt:
                    times[2].extend(uncut(ranks, rows, part))
            alone = floor(shape.exchanges(given.by, rows, kept), given.rounds)
            print(f"{name:<24} {_shown(times[0])} {_shown(times[1])} {_shown(alone)}")
            if times[2]:
                print(f"{'  not cut':<24} {'':>17} {_shown(times[2])}")
        ranks.close()
        single.close()
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
