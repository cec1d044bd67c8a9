"""Matrix products with few rows, as in decode, on the CPU.

MKL's methods for a weight [out, in] times a few rows differ in speed by a factor of two to four; which one is fastest
depends on the shape. The rules below were measured with one thread on an AVX2 machine (docs/performance.md). They are
fixed rather than tuned at load, so that every engine computes the same bits.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import linear

# Up to this many rows, weight @ rows^T is faster than rows @ weight^T for weights at least as tall as wide ...
_FEW_ROWS = 4
# ... and up to this many for a vocabulary projection. Above it, pieces that fit into the cache are faster.
_FEW_ROWS_TALL = 8
_TALL = 32768
_PIECE = 2048
_MOST_ROWS = 64


def speed_up(module: torch.nn.Module) -> int:
    """Use the faster product in every suitable linear layer of an fp32 CPU model; returns the number of layers."""
    changed = 0
    for layer in module.modules():
        weight = getattr(layer, "weight", None)
        if type(layer) is torch.nn.Linear and weight is not None and _suits(weight):
            layer.forward = partial(product, weight=weight, bias=layer.bias)  # type: ignore[method-assign]
            changed += 1
    return changed


def product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """rows [..., in] times weight [out, in] transposed, plus bias: equals torch.nn.functional.linear."""
    count = rows.numel() // rows.shape[-1]
    tall = weight.shape[0] >= _TALL
    if count == 0 or count > _MOST_ROWS or (count > _FEW_ROWS and not tall):
        return linear(rows, weight, bias)
    flat = rows.reshape(count, rows.shape[-1])
    found = _transposed(flat, weight) if count <= (_FEW_ROWS_TALL if tall else _FEW_ROWS) else _pieces(flat, weight)
    if bias is not None:
        found += bias
    return found.view(*rows.shape[:-1], weight.shape[0])


def _suits(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype is torch.float32 and weight.shape[0] >= weight.shape[1]


def _transposed(flat: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A single row is doubled: a matrix-vector product would use only half the memory bandwidth."""
    count = flat.shape[0]
    wide = torch.cat([flat, flat]) if count == 1 else flat
    return torch.mm(weight, wide.t())[:, :count].t().contiguous()


def _pieces(flat: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out = flat.new_empty(flat.shape[0], weight.shape[0])
    for start in range(0, weight.shape[0], _PIECE):
        out[:, start : start + _PIECE] = linear(flat, weight[start : start + _PIECE])
    return out
