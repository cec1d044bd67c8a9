"""The engine on a GPU. Skipped without a GPU; `pytest -rs` shows the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pdctl.engine.cache.kv_pool import KvPool
from pdctl.engine.cache.layout import block_bytes
from pdctl.engine.cache.memory import Memory
from pdctl.engine.model.loading import load_model
from pdctl.engine.model.runner import ModelRunner
from pdctl.wire import Manifest
from tests.engine.model.test_loading import paged, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the GPU path was not tested"),
]


def runner(model: Path) -> ModelRunner:
    device = torch.device("cuda")
    loaded = load_model(str(model), device, torch.float32)
    manifest = Manifest(loaded.fingerprint, loaded.dtype, 16, loaded.shapes)
    region = Memory(block_bytes(manifest) * 64, "gpu")
    return ModelRunner(loaded, KvPool(manifest, 64, region, device), device)


def test_paged_output_on_the_gpu_equals_generate_on_the_cpu(tiny_model: Path) -> None:
    prompts = [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 33, 100)]
    made = runner(tiny_model)
    made.self_check()
    assert paged(made, prompts, tokens=64, fragment=False) == reference(tiny_model, prompts)
    assert paged(made, prompts, tokens=64, fragment=True) == reference(tiny_model, prompts)


def test_blocks_go_through_the_host_mirror(tiny_model: Path) -> None:
    source, target = runner(tiny_model).pool, runner(tiny_model).pool
    for plane in (*source.keys, *source.values):
        plane.normal_()
    source.publish([3, 4])
    target.memory.view[:] = source.memory.view
    target.absorb([3, 4])
    for mine, theirs in zip((*source.keys, *source.values), (*target.keys, *target.values), strict=True):
        assert torch.equal(mine[48:80], theirs[48:80])
