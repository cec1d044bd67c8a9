"""A hit in the prefix cache against a miss, bit for bit, with real models."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from pdctl.engine.cache import prefix
from pdctl.engine.cache.blocks import BlockAllocator
from pdctl.engine.cache.kv_pool import KvPool
from pdctl.engine.cache.layout import block_bytes
from pdctl.engine.cache.memory import Memory
from pdctl.engine.ipc.messages import Logprobs, Sampling
from pdctl.engine.model.attention import Backend
from pdctl.engine.model.loading import load_model
from pdctl.engine.model.products import packs
from pdctl.engine.model.runner import ModelRunner
from pdctl.engine.schedule.batch import Limits
from pdctl.engine.schedule.scheduler import Scheduler
from pdctl.engine.schedule.sequence import Sequence
from pdctl.wire import Manifest
from tests.engine.model.test_loading import save

BLOCK, BLOCKS, BUDGET, NEW = 16, 200, 256, 4
SEGMENT = prefix.segment(BLOCK)
# Wide enough for packed weights, whose products of a row are the same bits in every batch.
WIDE = {
    "hidden_size": 512, "vocab_size": 512, "intermediate_size": 512, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "num_hidden_layers": 2, "max_position_embeddings": 2048,
}  # fmt: skip


class Engine:
    """Scheduler and runner. Each request is greedy, and tells the log probabilities of its tokens: the logits' bits."""

    def __init__(self, runner: ModelRunner, segment: int) -> None:
        limits = Limits(4, BUDGET, 2048, BLOCK, frozenset(), segment=segment)
        self.scheduler = Scheduler(limits, BlockAllocator(BLOCKS), root=b"r")
        self.runner = runner
        self.told: dict[str, list[Logprobs]] = {}
        self.cached: dict[str, int] = {}

    def add(self, name: str, prompt: list[int]) -> None:
        sampling = Sampling(NEW, temperature=0.0, logprobs=5)
        assert self.scheduler.add(Sequence(name, list(prompt), len(prompt), sampling)) is None

    def step(self) -> None:
        batch = self.scheduler.schedule()
        if not batch:
            return
        outcome = self.scheduler.update(batch, *self.runner.execute(batch))
        self.scheduler.audit()
        for token in outcome.tokens:
            assert token.logprobs is not None
            self.told.setdefault(token.request_id, []).append(token.logprobs)
            self.cached.setdefault(token.request_id, token.cached)

    def run(self) -> None:
        while self.scheduler.has_work:
            self.step()


def runner_for(folder: Path, dtype: torch.dtype, backend: Backend | None = None) -> ModelRunner:
    loaded = load_model(str(folder), torch.device("cpu"), dtype)
    manifest = Manifest(loaded.fingerprint, loaded.dtype, BLOCK, loaded.shapes, SEGMENT)
    pool = KvPool(manifest, BLOCKS, Memory(block_bytes(manifest) * BLOCKS, "test"), torch.device("cpu"))
    return ModelRunner(loaded, pool, torch.device("cpu"), backend=backend)


def prompts() -> dict[str, list[int]]:
    """Prompts that begin alike, at borders of segments and elsewhere."""
    rng = random.Random(5)
    base = [rng.randint(5, 500) for _ in range(300)]
    lengths = {"border": 256, "beyond": 257, "middle": 300}
    return {name: base[:length] for name, length in lengths.items()} | {"other end": [*base[:150], *base[:150]]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "options"), [("qwen3", {}), ("gemma3_text", {"sliding_window": 48})])
def test_a_hit_has_the_bits_of_a_miss(
    kind: str, options: dict[str, object], dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.set_num_threads(1)  # as in an engine
    save(kind, tmp_path, WIDE | options)
    runner, asked = runner_for(tmp_path, dtype), prompts()
    missed = {}
    for name, prompt in asked.items():
        alone = Engine(runner, SEGMENT)
        alone.add(name, prompt)
        alone.run()
        missed[name] = alone.told[name]
    rng = random.Random(1)
    for _ in range(2):
        engine, hits = Engine(runner, SEGMENT), 0
        for number in range(9):
            name = rng.choice(list(asked))
            engine.add(f"{name}/{number}", asked[name])
            # Several at once only where the others in a batch do not matter.
            for _ in range(rng.choice((0, 0, 3, 30)) if packs(dtype) else 1000):
                engine.step()
        engine.run()
        for named, told in engine.told.items():
            assert told == missed[named.partition("/")[0]], f"{named} has other bits"
            hits += engine.cached[named] > 0
            assert engine.cached[named] % SEGMENT == 0
        assert hits > 2
