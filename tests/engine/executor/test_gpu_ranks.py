"""Ranks whose pools are on GPUs of their own, over the stand-in of tests/fakes/gpu: real processes, which map each
other's pools through CUDA's calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pdctl.engine.cache import kv_pool
from pdctl.engine.cache.layout import block_bytes
from pdctl.engine.executor import exported, gpu_memory, rank_pools, ranks
from pdctl.engine.executor.ranks import RanksExecutor
from pdctl.engine.executor.single import POISON_ENV, SingleExecutor
from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.model.loading import ModelRefused
from pdctl.engine.options import EngineOptions
from pdctl.engine.schedule.batch import Slice
from pdctl.engine.schedule.sequence import Sequence
from tests.engine.executor.test_ranks import PROMPT, SAMPLINGS, TOKENS, answer, options
from tests.fakes import cudart, gpu
from tests.fakes.gpu import patches

pytestmark = pytest.mark.skipif(bool(cudart.NO_COMPILER), reason=cudart.NO_COMPILER)
MIB = 2**20


@pytest.fixture(autouse=True)
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """In this process, and in those of the other ranks."""
    for name, value in gpu.environment(tmp_path_factory.mktemp("cuda")).items():
        monkeypatch.setenv(name, value)
    cudart.load()
    monkeypatch.setattr(rank_pools, "is_apart", lambda device: True)
    monkeypatch.setattr(kv_pool, "allocate", patches.allocate)
    monkeypatch.setattr(exported, "tensor_at", patches.tensor_at)
    monkeypatch.setattr(gpu_memory, "measured", patches.measured)
    yield
    patches.kept.clear()


@contextmanager
def started(given: EngineOptions) -> Iterator[RanksExecutor]:
    executor = None
    try:
        executor = RanksExecutor.load_ranks(given, lambda reason, is_final: None)
        yield executor
    finally:
        if executor is not None:
            executor.others.kill()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("width", [(2, 1, 1), (1, 2, 1), (1, 1, 2)], ids=["tensor", "stages", "stripes"])
def test_they_answer_as_one_process_and_the_core_sees_all_kv(
    width: tuple[int, int, int], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = SingleExecutor.load(options(tiny_model, tmp_path, 1))
    expected = [answer(single, sampling) for sampling in SAMPLINGS]
    whole = [half for layer in zip(single.pool.keys, single.pool.values, strict=True) for half in layer]
    slots = torch.tensor([block * 16 + at for block in (7, 2, 5, 9) for at in range(16)][: len(PROMPT) + TOKENS - 1])
    single.close()
    monkeypatch.setenv(POISON_ENV, "1")
    with started(options(tiny_model, tmp_path, *width)) as executor:
        assert [answer(executor, sampling) for sampling in SAMPLINGS] == expected
        assert not any(pool.is_on_host for pool in executor.pools)
        for shard, pool in zip(executor.shards, executor.pools, strict=True):
            first, halves = shard.part.first_layer, list(zip(pool.keys, pool.values, strict=True))
            for number, half in enumerate((half for layer in halves for half in layer), 2 * first):
                heads = half.shape[1]
                own = whole[number][slots, shard.part.rank * heads : (shard.part.rank + 1) * heads]
                torch.testing.assert_close(half[slots], own, msg="the KV of another process")
        # What the core writes there, the rank computes with.
        assert executor.poison is not None
        executor.pools[1].poison([7])
        sequence = Sequence("s", list(PROMPT), len(PROMPT), Sampling(1), block_ids=[7, 2, 5, 9])
        with pytest.raises(AssertionError, match="after its blocks were freed"):
            executor.execute([Slice(sequence, 16, len(PROMPT) - 16, True)])


def test_all_have_the_blocks_that_the_smallest_gpu_holds(tiny_model: Path, tmp_path: Path) -> None:
    """Each rank has measured the largest step, which all compute together."""
    given = replace(options(tiny_model, tmp_path, 2), kv_cache_gb=0.0, gpu_memory_utilization=1.0)
    with started(given) as executor:
        [first, second] = executor.pools
        assert first.num_blocks == second.num_blocks == patches.room_of(1) // block_bytes(second.manifest)
        assert answer(executor, SAMPLINGS[0]), "the small pools are gone, and these are used"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: replace(one, kv_cache_gb=0.0, gpu_memory_utilization=0.01), "leaves no room for KV"),
        (lambda one: replace(one, kv_cache_gb=1.0), r"does not fit: 0\.5 of 0\.2 GiB of memory are free"),
    ],
    ids=["no room", "too large"],
)
def test_what_a_gpu_has_no_room_for_is_refused(
    change: Callable[[EngineOptions], EngineOptions], message: str, tiny_model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(ranks, "free_memory", lambda device: 200 * MIB)
    with pytest.raises(ModelRefused, match=message), started(change(options(tiny_model, tmp_path, 2))):
        pass


def test_a_pool_that_cannot_be_mapped_ends_the_engine(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where two containers see each other's GPUs, and not each other's memory."""
    real = exported.mapped
    nowhere = ["0/" + "00" * 64]
    monkeypatch.setattr(
        rank_pools, "mapped", lambda manifests, blocks, places, devices: real(manifests, blocks, nowhere, devices)
    )
    given = options(tiny_model, tmp_path, 2)
    with pytest.raises(ModelRefused, match="another rank's KV cannot be mapped"), started(given):
        pass
