from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import linear

from pdctl.engine.model.products import PLAIN_WAYS, _by_onednn, agree, block_rows, pack, packs, padded, same_bits

needs_packing = pytest.mark.skipif(not packs(torch.float32), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def one_by_one(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product, each row alone."""
    return torch.stack([weight.float() @ row.float() for row in rows]).to(rows.dtype)


@pytest.mark.parametrize("shape", [(64, 64), (300, 40), (40, 300), (5000, 8)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_is_linear(shape: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    weight, given = numbers(*shape, dtype=dtype), numbers(rows, shape[1], dtype=dtype)
    expected = linear(given.double(), weight.double())
    found = [way(given, weight) for way in PLAIN_WAYS.values()]
    if packs(dtype):
        found += [padded(given, weight), padded(given, pack(weight))]
    for one in found:
        assert one.dtype is dtype
        assert one.shape == expected.shape
        assert one.is_contiguous()
        assert torch.allclose(
            one.double(),
            expected,
            rtol=1e-5 if dtype is torch.float32 else 2e-2,
            atol=1e-4 if dtype is torch.float32 else 0.1,
        )


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2048, 640), (640, 2048), (300, 333), (1024, 3072)])
def test_a_row_has_the_same_bits_in_every_batch_packed_or_not(shape: tuple[int, int], dtype: torch.dtype) -> None:
    if not packs(dtype):
        pytest.skip(f"this CPU cannot pack {dtype}")
    weight, given = numbers(*shape, dtype=dtype), numbers(130, shape[1], dtype=dtype)
    packed = pack(weight)
    whole = padded(given, packed)
    for rows in (1, 2, 3, 4, 5, 8, 13, 16, 33, 64, 100):
        assert torch.equal(padded(given[:rows], packed), whole[:rows]), rows
        assert torch.equal(padded(given[:rows], weight), whole[:rows]), rows


def test_agreement_allows_rounding_and_nothing_else() -> None:
    one = numbers(3, 50)
    assert agree(one + 1e-6, one)
    assert not agree(one * 1.001, one)
    assert agree(one.bfloat16(), (one * 1.001).bfloat16())
    assert not agree(one.bfloat16(), (one * 1.2).bfloat16())
    assert not agree(one * torch.nan, one)


def test_types_that_onednn_lacks_are_not_packed() -> None:
    assert not packs(torch.float64)


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_way_that_adds_up_in_another_order_for_some_numbers_of_rows_is_found(dtype: torch.dtype) -> None:
    """Also where almost all sums round to the same bfloat16."""

    def depending(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if len(rows) > 32:
            return one_by_one(rows, weight)
        halves = [one_by_one(rows[:, part].float(), weight[:, part].float()) for part in (slice(64), slice(64, None))]
        return (halves[0] + halves[1]).to(dtype)

    given, weight = numbers(33, 640, dtype=dtype), numbers(256, 640, dtype=dtype)
    if dtype is torch.bfloat16:
        found, expected = depending(given[:32], weight), depending(given, weight)[:32]
        assert (found == expected).float().mean() > 0.99
    assert not same_bits(depending, torch.clone, dtype)
    assert same_bits(one_by_one, torch.clone, dtype)


@needs_packing
def test_rows_in_blocks_are_tried_where_all_at_once_depend_on_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[int] = []

    def product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, block: int) -> torch.Tensor:
        blocks.append(block)
        return one_by_one(rows, weight) * (1 + 1e-6 * len(rows) * (block == 0))

    monkeypatch.setattr("pdctl.engine.model.products._by_onednn", product)
    monkeypatch.setattr("pdctl.engine.model.products._reordered", torch.clone)
    block_rows.cache_clear()
    assert block_rows(torch.float32) == 64
    assert set(blocks) == {0, 64}
    block_rows.cache_clear()


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3, 63, 64, 65, 130])
def test_rows_in_blocks_are_linear(count: int, dtype: torch.dtype) -> None:
    if not packs(dtype):
        pytest.skip(f"this CPU cannot pack {dtype}")
    given, weight, bias = numbers(count, 40, dtype=dtype), numbers(70, 40, dtype=dtype), numbers(70, dtype=dtype)
    found = _by_onednn(given, weight, bias, 64)
    assert found.shape == (count, 70)
    assert agree(found, linear(given, weight, bias))


def test_a_torch_without_the_operators_packs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(weight: torch.Tensor) -> torch.Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_linear_weight'")

    monkeypatch.setattr("pdctl.engine.model.products._reordered", missing)
    for found in (block_rows, packs):
        found.cache_clear()
    assert not packs(torch.bfloat16)
    for found in (block_rows, packs):
        found.cache_clear()
