"""The executor of one device, in the core's own process."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pdctl.engine.cache.kv_pool import DTYPES, KvPool
from pdctl.engine.cache.layout import block_bytes
from pdctl.engine.cache.memory import Memory
from pdctl.engine.executor import Computed
from pdctl.engine.model.grammar import Grammars
from pdctl.engine.model.loading import LoadedModel, ModelRefused, load_model
from pdctl.engine.model.precision import choose_dtype
from pdctl.engine.model.runner import ModelRunner
from pdctl.engine.model.ways import cpu_name
from pdctl.engine.options import EngineOptions
from pdctl.engine.schedule.batch import Slice
from pdctl.host.memory import read_memory
from pdctl.host.users import cache_root
from pdctl.wire import Manifest

# Debug option: freed blocks are filled with NaN, and a NaN in the logits ends the engine.
POISON_ENV = "PDCTL_POISON_FREED"
_FEWEST_BLOCKS = 8


class SingleExecutor:
    """See Executor. `memory` holds the pool's bytes. `poison` fills freed blocks with NaN; None if that is off."""

    def __init__(self, loaded: LoadedModel, manifest: Manifest, memory: Memory, runner: ModelRunner) -> None:
        self.loaded = loaded
        self.manifest = manifest
        self.memory = memory
        self.grammars = runner.grammars
        self.num_blocks = runner.pool.num_blocks
        self.poison: Callable[[list[int]], None] | None = runner.pool.poison if runner.poisoned else None
        self._runner = runner

    @classmethod
    def load(cls, options: EngineOptions) -> SingleExecutor:
        """Load the model and allocate its KV. Raises ModelRefused, NoMemory, torch.OutOfMemoryError."""
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        device = torch.device(options.device)
        dtype = choose_dtype(options.dtype, device)
        reserved = int(options.kv_cache_gb * 2**30)
        loaded = load_model(options.model, device, dtype, cache_root() / "products", reserved)
        assert loaded.dtype in DTYPES
        manifest = Manifest(loaded.fingerprint, loaded.dtype, options.block_size, loaded.shapes)
        num_blocks = _num_blocks(options, manifest)
        memory = Memory(num_blocks * block_bytes(manifest), options.epoch)
        pool = KvPool(manifest, num_blocks, memory, device)
        grammars = Grammars(Path(options.model), loaded.vocab_size, loaded.eos_token_ids)
        runner = ModelRunner(loaded, pool, device, bool(os.environ.get(POISON_ENV)), grammars)
        runner.self_check()
        return cls(loaded, manifest, memory, runner)

    @property
    def latency_key(self) -> tuple[str, ...]:
        """What the durations of its steps depend on, as words."""
        device = self._runner.device
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
        threads = f"{torch.get_num_threads()} threads"
        return (self.manifest.model, self.manifest.dtype, where, threads, f"torch {torch.__version__}")

    def execute(self, batch: list[Slice]) -> Computed:
        """See Executor.execute."""
        return self._runner.execute(batch)

    def absorb(self, block_ids: Sequence[int]) -> None:
        """See Executor.absorb."""
        self._runner.pool.absorb(block_ids)

    def publish(self, block_ids: Sequence[int]) -> None:
        """See Executor.publish."""
        self._runner.pool.publish(block_ids)

    def close(self) -> None:
        """See Executor.close."""
        self.grammars.close()


def _num_blocks(options: EngineOptions, manifest: Manifest) -> int:
    """The number of blocks that fit into `kv_cache_gb`. Raises ModelRefused if it is too small or too large."""
    size = block_bytes(manifest)
    num_blocks = int(options.kv_cache_gb * 2**30) // size
    if num_blocks < _FEWEST_BLOCKS:
        raise ModelRefused(
            f"kv_cache_gb = {options.kv_cache_gb:g} holds {num_blocks} blocks of {size} bytes; "
            f"raise it to {_FEWEST_BLOCKS * size / 2**30:.3g} at least, for {_FEWEST_BLOCKS} blocks"
        )
    _, available = read_memory()
    if num_blocks * size > available:
        raise ModelRefused(
            f"kv_cache_gb = {options.kv_cache_gb:g} does not fit: {available / 2**30:.1f} GiB of memory are free"
        )
    return num_blocks
