"""The executor of one device, in the core's own process."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pdctl.engine.cache import prefix
from pdctl.engine.cache.kv_pool import DTYPES, KvPool, is_apart
from pdctl.engine.cache.layout import block_bytes
from pdctl.engine.cache.memory import Memory
from pdctl.engine.cache.shards import Shard
from pdctl.engine.executor import Computed, Launched
from pdctl.engine.executor.gpu_memory import blocks_in, free_memory, number_of_blocks, room_for_kv
from pdctl.engine.executor.launches import Launches, Step
from pdctl.engine.model import native
from pdctl.engine.model.attention.batch import PoolNeed
from pdctl.engine.model.attention.choice import AttentionRefused, Chosen, choose
from pdctl.engine.model.grammar import Grammars
from pdctl.engine.model.graphs import CudaRecorder, GraphsRefused
from pdctl.engine.model.loading import LoadedModel, ModelRefused, load_model
from pdctl.engine.model.parallel import Group
from pdctl.engine.model.precision import choose_dtype
from pdctl.engine.model.runner import ModelRunner
from pdctl.engine.options import EngineOptions
from pdctl.engine.schedule.batch import Slice
from pdctl.host.processor import cpu_name
from pdctl.host.users import cache_root
from pdctl.speculative import parse_speculative
from pdctl.wire import Manifest

# Debug option: freed blocks are filled with NaN, and a NaN in the logits ends the engine.
POISON_ENV = "PDCTL_POISON_FREED"
# Each size of a graph takes a part of a second at the start.
_MOST_GUESSED_ROWS = 512

_log = logging.getLogger(__name__)


class SingleExecutor:
    """See Executor. `pool` holds the KV. `poison` fills freed blocks with NaN; None if that is off.
    `attention`: its backend, and why. `graphs`: the decode steps that are CUDA graphs, or why none is; "" on a CPU.
    Sequences use the first `num_blocks` of the pool's `pool_blocks`."""

    def __init__(
        self,
        loaded: LoadedModel,
        manifest: Manifest,
        runner: ModelRunner,
        attention: str,
        num_blocks: int,
        graphs: str,
        in_thread: bool = False,
    ) -> None:
        self.loaded = loaded
        self.manifest = manifest
        self.pool = runner.pool
        self.attention = attention
        self.grammars = runner.grammars
        self.num_blocks = num_blocks
        self.pool_blocks = runner.pool.num_blocks
        self.pools = [runner.pool]
        self.shards = [Shard(manifest, runner.pool.num_blocks, loaded.part)]
        self.graphs = graphs
        self.poison: Callable[[list[int]], None] | None = runner.pool.poison if runner.poisoned else None
        self._runner = runner
        self._launches = Launches(runner, in_thread)

    @classmethod
    def load(cls, options: EngineOptions) -> SingleExecutor:
        """Load the model and allocate its KV. Raises ModelRefused, NoMemory, torch.OutOfMemoryError."""
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        device = torch.device(options.device)
        loaded, chosen = load_part(options, device)
        segment = prefix.segment(options.block_size) if options.deterministic else 0
        manifest = Manifest(loaded.fingerprint, loaded.dtype, options.block_size, loaded.shapes, segment)

        def runner_over(num_blocks: int) -> ModelRunner:
            pool = KvPool(manifest, num_blocks, None, device)
            return ModelRunner(loaded, pool, device, backend=chosen.backend)

        if options.gpu_memory_utilization:
            num_blocks = blocks_in(room_for_kv(options, device, runner_over), manifest)
        else:
            num_blocks = number_of_blocks(options, [block_bytes(manifest)], [free_memory(device)])
        on_host = None if is_apart(device) else Memory(num_blocks * block_bytes(manifest), options.epoch)
        pool = KvPool(manifest, num_blocks, on_host, device)
        grammars = Grammars(Path(options.model), loaded.vocab_size, loaded.eos_token_ids)
        runner = ModelRunner(loaded, pool, device, bool(os.environ.get(POISON_ENV)), grammars, chosen.backend)
        runner.self_check()
        # The padding of CUDA graphs writes to a block of nobody.
        usable = num_blocks - 1 if device.type == "cuda" else num_blocks
        graphs = _capture(runner, options, usable) if device.type == "cuda" else ""
        attention = f"{chosen.backend.name}: {chosen.reason}"
        in_thread = options.schedules_ahead and device.type == "cpu"
        return cls(loaded, manifest, runner, attention, usable, graphs, in_thread)

    @property
    def latency_key(self) -> tuple[str, ...]:
        """What the durations of its steps depend on, as words."""
        device = self._runner.device
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
        threads = f"{torch.get_num_threads()} threads"
        kernels = native.version() if device.type == "cpu" else ""
        how = (self._runner.backend.name, *filter(None, [self.graphs, kernels and f"kernels {kernels}"]))
        return (self.manifest.model, self.manifest.dtype, where, threads, f"torch {torch.__version__}", *how)

    def launch(self, batch: list[Slice], after: Launched | None = None) -> Launched:
        """See Executor.launch."""
        assert after is None or isinstance(after, Step)
        return self._launches.launch(batch, after)

    def execute(self, batch: list[Slice]) -> Computed:
        """Compute every slice of a step: launch and finish it."""
        return self.launch(batch).finish()

    def publish(self, block_ids: Sequence[int]) -> None:
        """See Executor.publish."""
        self._runner.pool.publish(block_ids)

    def close(self) -> None:
        """See Executor.close."""
        self._launches.close()
        self.grammars.close()


def load_part(options: EngineOptions, device: torch.device, group: Group | None = None) -> tuple[LoadedModel, Chosen]:
    """The model, or this rank's part of it, and its attention. Raises ModelRefused, RankLost."""
    dtype = choose_dtype(options.dtype, device)
    reserved = int(options.kv_cache_gb * 2**30) if device.type == "cpu" else 0
    table = cache_root() / "products"
    loaded = load_model(options.model, device, dtype, table, reserved, group)
    chosen = _attention(options, loaded, device)
    is_chosen = options.dtype == "auto" and device.type == "cpu" and dtype is not torch.float32
    if is_chosen and chosen.backend.name != "native":
        # See choose_dtype. Only the loaded model tells what its layers need.
        _log.info("computing in float32: %s", chosen.reason)
        loaded = load_model(options.model, device, torch.float32, table, reserved, group)
        chosen = _attention(options, loaded, device)
    assert loaded.dtype in DTYPES
    return loaded, chosen


def _attention(options: EngineOptions, loaded: LoadedModel, device: torch.device) -> Chosen:
    """Raises ModelRefused if the backend that the topology names cannot serve the model."""
    try:
        return choose(options.attention, loaded.needs, PoolNeed(DTYPES[loaded.dtype], options.block_size), device)
    except AttentionRefused as failure:
        raise ModelRefused(str(failure)) from failure


def _capture(runner: ModelRunner, options: EngineOptions, scratch: int) -> str:
    """Capture CUDA graphs; returns what is captured, or why nothing is."""
    if options.enforce_eager:
        return "off: enforce_eager is set"
    try:
        recorder = CudaRecorder(runner.device)
        sizes = runner.capture(_rows(options), options.max_model_len, scratch, recorder)
    except GraphsRefused as failure:
        _log.warning("decoding without CUDA graphs: %s", failure)
        return f"off: {failure}"
    return f"decode steps of up to {sizes[-1]} tokens" if sizes else "off: capturing took too long"


def _rows(options: EngineOptions) -> int:
    """Tokens of the largest decode step that has a graph: guessed ones count like sequences."""
    guesses = parse_speculative(options.speculative)
    wanted = options.max_num_seqs * (1 + guesses.tokens if guesses else 1)
    return max(options.max_num_seqs, min(wanted, _MOST_GUESSED_ROWS))
