"""The executor of several devices on this host: the core's process is the first rank, and each other rank is a process
of its own.

All have the same blocks; each has its part of the weights, and KV of its layers and heads (`model/parallel`). The first
rank schedules, tells the others the inputs of each step once, computes with them, and samples. It maps the pools of
all, on GPUs too, so transfers need no other process. The end of a rank ends the engine, with that rank's reason.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pdctl.engine.cache import prefix
from pdctl.engine.cache.kv_pool import KvPool
from pdctl.engine.cache.shards import Shard, local
from pdctl.engine.executor import Launched
from pdctl.engine.executor.gpu_memory import free_memory
from pdctl.engine.executor.microbatches import microbatches
from pdctl.engine.executor.others import OtherRanks
from pdctl.engine.executor.pipe import Here, Loaded, device_of, own_device
from pdctl.engine.executor.rank_pools import AllRanks, open_pools
from pdctl.engine.executor.single import POISON_ENV, SingleExecutor, load_part
from pdctl.engine.model.grammar import Grammars
from pdctl.engine.model.loading import LoadedModel, ModelRefused
from pdctl.engine.model.parallel import RankLost
from pdctl.engine.model.parallel.group import Ranks, Width
from pdctl.engine.model.parallel.stages import layers_of_stage
from pdctl.engine.model.runner import ModelRunner
from pdctl.engine.options import EngineOptions
from pdctl.engine.schedule.batch import Slice
from pdctl.wire import Manifest, Part

# Time for a rank to import what it needs; to load the model; for all to connect; and to take part in a computation that
# another rank has reached. Ranks compute the same, so this is what a rank may be behind on a loaded machine.
_START_S = 300.0
_LOAD_S = 1800.0
_CONNECT_S = 180.0
STEP_S = 60.0

_log = logging.getLogger(__name__)


class RanksExecutor(SingleExecutor):
    """See Executor and SingleExecutor, which computes the first rank's part."""

    others: OtherRanks
    _group: Ranks
    _folder: Path | None = None
    _stages = 1

    @classmethod
    def load_ranks(
        cls, options: EngineOptions, lost: Callable[[str, bool], None], step_s: float = STEP_S
    ) -> RanksExecutor:
        """Start the other ranks, load the model and allocate its KV. `lost`: called from any thread with the reason
        when a rank has ended, and whether a restart would not help. Raises ModelRefused, NoMemory, RankLost,
        torch.OutOfMemoryError."""
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        if options.cpus_of_rank:
            os.sched_setaffinity(0, options.cpus_of_rank)
        began = time.monotonic()
        others = OtherRanks(options, lost, step_s)
        try:
            executor = cls._joined(options, others, step_s)
        except BaseException:
            others.kill()
            raise
        _log.info("%d ranks, loaded in %.1f s", options.num_ranks, time.monotonic() - began)
        return executor

    @classmethod
    def _joined(cls, options: EngineOptions, others: OtherRanks, step_s: float) -> RanksExecutor:
        width = width_of(options)
        others.expect(Here, _START_S)
        device = own_device(options.device, 0)
        _use_all_gpus(options)
        folder = _meeting(options)
        try:
            others.join(str(folder / "meet"))
            with _in_time(others, _CONNECT_S):
                group = Ranks(0, width, folder / "meet", step_s, device)
            loaded, chosen = load_part(options, device, group)
        finally:
            # NCCL uses the file for as long as it runs.
            if device.type == "cpu":
                shutil.rmtree(folder)
        found = others.expect(Loaded, _LOAD_S)
        ours = how_loaded(loaded.dtype, chosen.backend.name)
        if different := [one.how for one in found if one.how != ours]:
            raise ModelRefused(f"the ranks computed differently: {ours} and {different[0]}")
        if width.stages > 1:
            loaded = _whole(loaded, found[width.size - 1 :: width.size])
        segment = prefix.segment(options.block_size) if options.deterministic else 0
        manifest = Manifest(loaded.fingerprint, loaded.dtype, options.block_size, loaded.shapes, segment)
        parts = [_part(number, loaded, width) for number in range(width.ranks)]
        free = [free_memory(device), *(one.free for one in found)]
        ranks = AllRanks(options, others, [local(manifest, part) for part in parts], free)

        def runner_over(num_blocks: int) -> ModelRunner:
            pool = KvPool(ranks.manifests[0], num_blocks, None, device)
            return ModelRunner(loaded, pool, device, backend=chosen.backend, others=others, group=group)

        pools = open_pools(ranks, runner_over)
        num_blocks = pools[0].num_blocks
        grammars = Grammars(Path(options.model), loaded.vocab_size, loaded.eos_token_ids)
        poisoned = bool(os.environ.get(POISON_ENV))
        runner = ModelRunner(loaded, pools[0], device, poisoned, grammars, chosen.backend, others, group)
        runner.self_check()
        executor = cls(loaded, manifest, runner, f"{chosen.backend.name}: {chosen.reason}", num_blocks, _graphs(device))
        executor.others, executor._group = others, group
        executor._folder = folder if folder.exists() else None
        # Segments of prompts are computed whole: their shape decides how sums are rounded.
        executor._stages = 1 if options.deterministic else width.stages
        executor.pools = pools
        executor.shards = [Shard(manifest, num_blocks, part) for part in parts]
        executor.poison = executor._poison if poisoned else None
        return executor

    @property
    def latency_key(self) -> tuple[str, ...]:
        """See SingleExecutor.latency_key."""
        return (*super().latency_key, f"{len(self.pools)} ranks")

    def launch(self, batch: list[Slice], after: Launched | None = None) -> Launched:
        """See Executor.launch. Stages compute several parts of a prompt at once."""
        *early, last = microbatches(batch, self._stages)
        for part in early:
            self._runner.advance(part)
        return super().launch(last, after)

    def close(self) -> None:
        """See Executor.close. The other ranks leave."""
        self.others.leave()
        self._group.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        super().close()

    def publish(self, block_ids: Sequence[int]) -> None:
        """See Executor.publish."""
        for pool in self.pools:
            pool.publish(block_ids)

    def _poison(self, block_ids: list[int]) -> None:
        for pool in self.pools:
            pool.poison(block_ids)


def _meeting(options: EngineOptions) -> Path:
    """A folder for the file at which the ranks meet; what an earlier engine of this name has left there is removed."""
    folder = options.run_dir / f"ranks-{options.name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    return folder


def _use_all_gpus(options: EngineOptions) -> None:
    """Take what this process needs on other ranks' GPUs, whose pools it will map, before these measure their room."""
    for rank in range(1, options.num_ranks if options.device == "cuda" else 1):
        torch.zeros(1, device=device_of(options.device, rank))


@contextlib.contextmanager
def _in_time(others: OtherRanks, seconds: float) -> Iterator[None]:
    """End the engine if this takes longer: NCCL connects without a deadline."""
    timer = threading.Timer(seconds, others.lose, [f"the ranks did not connect within {seconds:g} s"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _graphs(device: torch.device) -> str:
    return "off: the GPUs exchange tensors in each step" if device.type == "cuda" else ""


def _whole(loaded: LoadedModel, later: list[Loaded]) -> LoadedModel:
    """The first rank's model with the layers of all stages. `later`: the first rank of each stage behind it."""
    shapes = [shape for stage in (loaded.shapes, *(one.shapes for one in later)) for shape in stage]
    positions = min(loaded.max_positions, *(one.max_positions for one in later))
    return replace(loaded, shapes=shapes, max_positions=positions)


def _part(number: int, loaded: LoadedModel, width: Width) -> Part:
    """What the rank with this number has of the KV. `loaded`: the first one's model, with the layers of all stages."""
    if width.stripes > 1:
        return Part()
    stage, rank = divmod(number, width.size)
    own = layers_of_stage(len(loaded.shapes), stage, width.stages)
    place = (own.start, len(own)) if width.stages > 1 else (0, 0)
    return Part(rank, width.size, *place) if loaded.part.ranks > 1 else Part(0, 1, *place)


def width_of(options: EngineOptions) -> Width:
    """Over how many ranks an engine is."""
    return Width(options.tensor_parallel, options.pipeline_parallel, options.sequence_parallel)


def how_loaded(dtype: str, attention: str) -> tuple[str, ...]:
    """What must be equal on all ranks, or they would compute different things."""
    return (dtype, attention, str(torch.__version__))


__all__ = ["RankLost", "RanksExecutor", "how_loaded", "width_of"]
