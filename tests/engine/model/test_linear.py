from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from pdctl.engine.model.linear import product, speed_up


@pytest.mark.parametrize("shape", [(64, 64), (300, 40), (40, 300), (33000, 8)])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 8, 9, 64, 65])
@pytest.mark.parametrize("with_bias", [True, False])
def test_products_are_linears(shape: tuple[int, int], rows: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    bias = torch.randn(shape[0], generator=generator) if with_bias else None
    for given in (
        torch.randn(rows, shape[1], generator=generator),
        torch.randn(1, rows, shape[1], generator=generator),
    ):
        found = product(given, weight, bias)
        expected = linear(given, weight, bias)
        assert found.shape == expected.shape
        assert found.is_contiguous()
        assert torch.allclose(found, expected, atol=1e-3)


def test_only_suitable_layers_change() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4), torch.nn.Linear(4, 8).to(torch.bfloat16))
    assert speed_up(model) == 1
    assert model[0](torch.randn(3, 4)).shape == (3, 8)
