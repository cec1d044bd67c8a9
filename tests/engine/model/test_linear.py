from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

from pdctl.engine.model import linear as tested
from pdctl.engine.model.linear import PackedProduct, Sped, Watch, product, speed_up
from pdctl.engine.model.products import PLAIN_WAYS, packs, padded
from pdctl.engine.model.ways import Ways

PLENTY = 1 << 40
needs_packing = pytest.mark.skipif(not packs(torch.float32), reason="this torch has no oneDNN")


class Model(torch.nn.Module):
    """Has each kind of layer. `shared` is an embedding's table too; the weight of `read` is read, not called."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(512, 512)
        self.q_proj = torch.nn.Linear(512, 512, bias=bias)
        self.k_proj = torch.nn.Linear(512, 256, bias=bias)
        self.v_proj = torch.nn.Linear(512, 256, bias=bias)
        self.gate_proj = torch.nn.Linear(1024, 512, bias=bias)
        self.up_proj = torch.nn.Linear(1024, 512, bias=bias)
        self.tiny = torch.nn.Linear(1024, 8)
        self.read = torch.nn.Linear(512, 512)
        self.shared = torch.nn.Linear(512, 512, bias=False)
        self.shared.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.table(ids)
        rows = torch.cat([self.q_proj(rows), self.k_proj(rows), self.v_proj(rows)], -1)
        # Other inputs: these two are no siblings.
        rows = self.gate_proj(rows) * self.up_proj(rows * 0.5) + self.tiny(rows).sum(-1, keepdim=True)
        found: torch.Tensor = self.shared(linear(rows, self.read.weight))
        return found


def sped(model: torch.nn.Module, ids: torch.Tensor, room: int = PLENTY) -> Sped:
    with torch.inference_mode(), Watch(model) as watch:
        model(ids)
    return speed_up(model, watch, None, room)


@pytest.mark.parametrize("shape", [(64, 64), (300, 40), (40, 300), (33000, 8)])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 8, 9, 16, 64, 65])
@pytest.mark.parametrize("with_bias", [True, False])
def test_products_are_linears(shape: tuple[int, int], rows: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    bias = torch.randn(shape[0], generator=generator) if with_bias else None
    ways = [Ways(plain=(name, name, name, name)) for name in PLAIN_WAYS]
    packed = [PackedProduct(weight, bias, copied) for copied in (True, False)] if packs(torch.float32) else []
    for given in (
        torch.randn(rows, shape[1], generator=generator),
        torch.randn(1, rows, shape[1], generator=generator),
    ):
        expected = linear(given, weight, bias)
        for found in [*(product(given, weight, bias, way) for way in ways), *(each(given) for each in packed)]:
            assert found.shape == expected.shape
            assert found.is_contiguous()
            assert torch.allclose(found, expected, atol=1e-3)


def test_the_way_follows_the_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for name in ("transposed", "pieces"):

        def way(rows: torch.Tensor, weight: torch.Tensor, name: str = name) -> torch.Tensor:
            used.append(f"{name} {len(rows)}")
            return linear(rows, weight)

        monkeypatch.setitem(PLAIN_WAYS, name, way)
    weight = torch.randn(8, 4)
    for rows in (1, 2, 4, 5, 16, 17, 64, 65):
        product(torch.randn(rows, 4), weight, None, Ways(plain=("pieces", "transposed", "linear", "pieces")))
    assert used == ["pieces 1", "transposed 2", "transposed 4", "pieces 17", "pieces 64"]


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_sped_up_model_computes_the_same(dtype: torch.dtype, bias: bool) -> None:
    if not packs(dtype):
        pytest.skip(f"this CPU cannot pack {dtype}")
    model, ids = Model(bias).to(dtype).requires_grad_(False), torch.arange(40)
    model.shared.weight = model.table.weight
    expected = model(ids)
    every = dtype is torch.bfloat16  # where other bits could be another token
    assert sped(model, ids[:3]) == Sped(packed=6 + every, plain=0, kept_bytes=512 * 512 * dtype.itemsize)
    allowed = 1e-4 if dtype is torch.float32 else 5e-2
    for count in (40, 3, 1, 2):
        found = model(ids[:count])
        assert torch.allclose(found, expected[:count], atol=allowed * float(expected.abs().max()), rtol=0)
    # The packed copy replaces the plain one, but where other code uses that.
    assert model.q_proj.weight.numel() == model.up_proj.weight.numel() == 0
    assert model.q_proj.weight.dtype is dtype
    assert model.table.weight is model.shared.weight
    assert bool(model.tiny.weight.numel()) is not every
    assert model.read.weight.numel()


@needs_packing
def test_a_shared_weight_is_copied_only_into_free_memory() -> None:
    """And its results are the same bits with and without a copy."""
    first, second, ids = Model(), Model(), torch.arange(9)
    with torch.inference_mode():
        assert sped(first, ids, room=1 << 20).kept_bytes == 1 << 20
        assert sped(second, ids, room=(1 << 20) - 1) == Sped(packed=6, plain=0, kept_bytes=0)
        for count in (1, 2, 9):
            assert torch.equal(first(ids[:count]), second(ids[:count]))


@needs_packing
def test_siblings_are_one_product_with_the_same_input_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = Model().requires_grad_(False), torch.arange(5)
    calls: list[int] = []

    def counted(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(len(rows))
        return padded(rows, weight, bias)

    monkeypatch.setattr(tested, "padded", counted)
    sped(model, ids)
    calls.clear()
    model(ids)
    # q, k and v together; gate, up and the shared one.
    assert len(calls) == 4
    rows, other = torch.randn(5, 512), torch.randn(5, 512)
    once = [model.q_proj(rows), model.k_proj(other), model.v_proj(rows), model.q_proj(rows), model.q_proj(rows)]
    fresh = Model()
    for found, layer, given in zip(
        once,
        (fresh.q_proj, fresh.k_proj, fresh.v_proj, fresh.q_proj, fresh.q_proj),
        (rows, other, rows, rows, rows),
        strict=True,
    ):
        assert torch.allclose(found, layer(given), atol=1e-4)


def test_a_product_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tested, "pack", lambda weight: weight)
    monkeypatch.setattr(tested, "padded", lambda rows, weight, bias: linear(rows, weight, bias) * 1.01)
    monkeypatch.setattr(tested, "choose", lambda sizes, dtype, folder: dict.fromkeys(sizes, Ways(packed=True)))
    model, ids = Model().requires_grad_(False), torch.arange(5)
    expected = model(ids)
    assert sped(model, ids) == Sped(packed=0, plain=6, kept_bytes=0)
    assert torch.allclose(model(ids), expected, atol=1e-4)


def test_without_onednn_the_plain_ways_remain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("linear", "ways"):
        monkeypatch.setattr(f"pdctl.engine.model.{name}.packs", lambda dtype: False)
    model, ids = Model().requires_grad_(False), torch.arange(5)
    expected = model(ids)
    assert sped(model, ids) == Sped(packed=0, plain=6, kept_bytes=0)
    assert torch.allclose(model(ids), expected, atol=1e-4)


def test_a_layer_called_by_keyword_stays_as_it_is() -> None:
    class Keyword(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Linear(512, 512)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.one(input=rows)
            return found

    assert sped(Keyword(), torch.randn(3, 512)) == Sped(0, 0, 0)
