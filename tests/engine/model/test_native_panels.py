"""Products by the compiled kernel: right, and one sum in the order of the inputs, however they are computed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch

from pdctl.engine.model import products as chosen
from pdctl.engine.model.native.panels import Panels, Products, products
from pdctl.engine.model.products import pack, packer, padded

pytestmark = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
SHAPES = [(1, 1), (3, 5), (16, 16), (63, 17), (64, 640), (65, 33), (200, 1100), (40, 2050)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield


def kernel() -> Products:
    found = products(torch.float32)
    assert found is not None
    return found


def some(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 13, 200])
def test_products(shape: tuple[int, int], count: int) -> None:
    weight, rows = some(*shape), some(count, shape[1] + 3)[:, 2:-1]
    expected = (rows.double() @ weight.double().t()).float()
    for form in (weight, kernel().pack(weight), kernel().pack(weight.t().contiguous().t())):
        found = kernel().multiply(rows, form)
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_has_the_same_bits_alone_and_packed_or_not(shape: tuple[int, int]) -> None:
    weight, rows = some(*shape), some(205, shape[1])
    packed = kernel().pack(weight)
    whole = kernel().multiply(rows, packed)
    for first, last in ((0, 1), (5, 7), (190, 205), (3, 199), (0, 205)):
        for form in (packed, weight):
            assert torch.equal(kernel().multiply(rows[first:last], form), whole[first:last])


def test_layers_together_have_the_bits_of_each() -> None:
    """So siblings may be packed together or not."""
    weight, rows = some(150, 700), some(9, 700)
    whole = kernel().multiply(rows, kernel().pack(weight))
    for first, last in ((0, 40), (40, 150)):
        assert torch.equal(kernel().multiply(rows, kernel().pack(weight[first:last])), whole[:, first:last])


def test_a_bias_and_strided_rows() -> None:
    weight, bias, rows = some(70, 30), some(70), some(30, 8).t()
    for form in (weight, pack(weight)):
        found = padded(rows, form, bias)
        torch.testing.assert_close(found, torch.nn.functional.linear(rows, weight, bias), rtol=1e-5, atol=1e-5)


def test_what_packs() -> None:
    assert (packer(torch.float32), packer(torch.bfloat16)) == ("native", "oneDNN")
    weight, rows = some(70, 30), some(3, 30)
    packed = pack(weight)
    assert isinstance(packed, Panels)
    expected = padded(rows, packed)
    torch.set_num_threads(2)
    assert packer(torch.float32) == "oneDNN"
    # What was packed by the kernel is computed by it.
    assert torch.equal(padded(rows, packed), expected)


def test_without_a_compiler_onednn_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "products", lambda dtype: None)
    packed = pack(some(70, 30))
    assert isinstance(packed, torch.Tensor)
    assert packed.is_mkldnn
    expected = some(3, 30) @ some(70, 30).t()
    torch.testing.assert_close(padded(some(3, 30), packed), expected, rtol=1e-5, atol=1e-5)


def test_numbers_that_are_not_finite_stay_where_they_are() -> None:
    weight, rows = some(65, 20), some(7, 20)
    expected = kernel().multiply(rows, kernel().pack(weight))
    rows[3, 4] = torch.nan
    weight[64, 0] = torch.inf
    found = kernel().multiply(rows, kernel().pack(weight))
    assert found[3].isnan().all()
    assert not found[:, 64].isfinite().any()
    kept = [0, 1, 2, 4, 5, 6]
    assert torch.equal(found[kept, :64], expected[kept, :64])
