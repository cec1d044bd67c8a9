"""Parts of transformers' models that use our kernels, and those that must stay as they are."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pdctl.engine.model import native
from pdctl.engine.model.attention import hook
from pdctl.engine.model.loading import dense_logits
from pdctl.engine.model.native import modules
from pdctl.engine.model.native.fuse import Fused, fuse
from pdctl.engine.model.native.modules import GatedMlp, Norm, Rotation
from pdctl.engine.model.native.rows import kernels
from tests.engine.model.test_deterministic import runner_for
from tests.engine.model.test_loading import save
from tests.engine.parity.families import BASE, FAMILIES

compiled = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def model(kind: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """With random weights, also those of norms."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**BASE, **FAMILIES[kind]})
    torch.manual_seed(2)
    found: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for weight in found.parameters():
        if weight.dim() == 1:
            weight.add_(torch.randn_like(weight), alpha=0.3)
    return found


def logits(module: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = module(input_ids=torch.arange(5, 45)[None]).logits[0]
    return found


# Norms, gated MLPs, and whether the family's rotation is one by halves.
KNOWN = {
    "llama": (9, 4, 1),
    "qwen3": (17, 4, 1),
    "gemma3_text": (25, 4, 1),
    "phi3": (9, 4, 1),  # gate and up in one
    "phi": (0, 0, 1),  # LayerNorm with a bias, no gate
    "glm": (9, 4, 0),  # rotates pairs
    "cohere": (0, 4, 0),  # LayerNorm without a bias
    "arcee": (9, 0, 1),  # no gate
}  # fmt: skip


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KNOWN)
def test_what_is_used_in_a_family(kind: str, dtype: torch.dtype) -> None:
    module = model(kind, dtype)
    expected = logits(module)
    assert fuse(module) == KNOWN[kind]
    allowed = (1e-5 if dtype is torch.float32 else 3e-2) * float(expected.abs().max())
    assert float((logits(module) - expected).abs().max()) <= allowed
    made = [type(part.forward) for part in module.modules()]
    assert (made.count(Norm), made.count(GatedMlp)) == KNOWN[kind][:2]


@compiled
def test_norms_in_bfloat16_round_as_the_family_does() -> None:
    """Llama rounds before it multiplies by the weight, Gemma after."""
    for kind in ("llama", "gemma3_text"):
        module = model(kind, torch.bfloat16)
        norm = module.get_submodule("model.norm")
        rows = torch.randn(1, 500, 64).bfloat16()
        expected = norm(rows)
        fuse(module)
        assert isinstance(norm.forward, Norm)
        assert (norm(rows) != expected).float().mean() < 1e-3


class _Other(torch.nn.Module):
    """Looks like an RMSNorm."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(16))
        self.eps, self.shift = 1e-6, shift

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight + self.shift


class _OtherMlp(torch.nn.Module):
    """Looks like a gated MLP."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = torch.nn.Linear(16, 32), torch.nn.Linear(16, 32)
        self.down_proj, self.act_fn, self.limit = torch.nn.Linear(32, 16), torch.nn.SiLU(), limit

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        up = self.up_proj(rows).clamp(max=self.limit)
        found: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(rows)) * up)
        return found


@compiled
def test_what_computes_something_else_stays() -> None:
    assert fuse(_Other(0.0)) == (1, 0, 0)
    assert fuse(_Other(0.01)) == (0, 0, 0)
    assert fuse(_OtherMlp(1e9)) == (0, 1, 0)
    assert fuse(_OtherMlp(0.1)) == (0, 0, 0)


@compiled
def test_tensors_that_a_kernel_does_not_take() -> None:
    norm, mlp = _Other(0.0), _OtherMlp(1e9)
    several, double = torch.randn(2, 3, 4, 16).transpose(1, 2), torch.randn(3, 16).double()
    expected, wide, deep = norm(several), norm(double), mlp(several)
    fuse(norm)
    fuse(mlp)
    assert torch.equal(norm(several), expected)
    assert torch.equal(norm(double), wide)
    with torch.inference_mode():
        torch.testing.assert_close(mlp(several), deep)


@compiled
def test_only_steps_of_an_engine_rotate_by_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("llama", tmp_path, {})
    runner = runner_for(tmp_path, torch.float32)
    code = sys.modules[type(runner.loaded.module).__module__]
    assert isinstance(code.apply_rotary_pos_emb, Rotation)
    calls: list[int] = []
    monkeypatch.setattr(modules, "rotated", lambda *_: calls.append(1))
    dense_logits(runner.loaded, torch.arange(5))
    assert not calls
    runner.self_check()
    assert calls
    assert not hook.is_in_step()


@pytest.fixture
def _uncompiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for cache in (native.library, kernels):
        cache.cache_clear()
    monkeypatch.setenv("PDCTL_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    yield
    for cache in (native.library, kernels):
        cache.cache_clear()


@pytest.mark.usefixtures("_uncompiled")
def test_without_a_compiler_the_model_computes() -> None:
    module = model("gemma3_text")
    expected = logits(module)
    assert fuse(module) == Fused(0, 0, 0)
    assert torch.equal(logits(module), expected)


@compiled
def test_more_than_one_thread_is_left_to_pytorch() -> None:
    torch.set_num_threads(2)
    assert fuse(model("llama")) == Fused(0, 0, 0)
