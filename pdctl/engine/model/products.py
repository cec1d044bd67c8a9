"""Ways to compute rows [n, in] times a weight [out, in] transposed, on the CPU.

oneDNN with a packed weight is fastest on most CPUs. Its results for a row are the same bits whatever other rows are
computed with it, packed or not, except for a single row alone. So fewer rows than four are padded. This is also faster:
one, two and four rows took 39, 49 and 31 ms (262,144 outputs, AMD EPYC of family 25 model 17). MKL's methods round
differently for different numbers of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
from torch.nn.functional import linear, pad

PlainName = Literal["linear", "transposed", "pieces"]
Way = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# A plain weight's way is chosen for up to each of these numbers of rows; `linear` computes more.
ROW_STEPS = (1, 4, 16, 64)
_PIECE = 2048
_FEWEST_ROWS = 4
DTYPES = (torch.float32, torch.bfloat16)


def transposed(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """weight @ rows^T. A single row is doubled: a matrix-vector product would use only half the memory bandwidth."""
    count = rows.shape[0]
    wide = torch.cat([rows, rows]) if count == 1 else rows
    return torch.mm(weight, wide.t())[:, :count].t().contiguous()


def pieces(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Pieces of the weight that fit into the cache."""
    out = rows.new_empty(rows.shape[0], weight.shape[0])
    for start in range(0, weight.shape[0], _PIECE):
        out[:, start : start + _PIECE] = linear(rows, weight[start : start + _PIECE])
    return out


PLAIN_WAYS: dict[PlainName, Way] = {"linear": linear, "transposed": transposed, "pieces": pieces}


def padded(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """oneDNN's product with a packed or plain weight; at least one row."""
    count = rows.shape[0]
    wide = pad(rows, (0, 0, 0, _FEWEST_ROWS - count)) if count < _FEWEST_ROWS else rows
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(wide, weight, bias, "none", [], "")
    return found[:count]


def pack(weight: torch.Tensor) -> torch.Tensor:
    """oneDNN's own layout of a weight: an opaque tensor with a copy of its values."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


@lru_cache(maxsize=8)
def packs(dtype: torch.dtype) -> bool:
    """Whether this build of torch can pack weights of this type on this CPU, with equal bits in every batch."""
    if dtype not in DTYPES or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    numbers = torch.Generator().manual_seed(1)
    rows = torch.randn(100, 640, generator=numbers).to(dtype)
    weight = torch.randn(512, 640, generator=numbers).to(dtype)
    try:
        packed = pack(weight)
        whole = padded(rows, packed)
        # CPUs without bfloat16 in hardware round it differently for different numbers of rows.
        same = all(
            torch.equal(padded(rows[:n], form), whole[:n]) for n in (1, 3, 5, 16, 33) for form in (packed, weight)
        )
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
    return same and agree(whole, linear(rows, weight))


def agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two products of the same numbers differ by no more than rounding."""
    allowed = 1e-4 if expected.dtype is torch.float32 else 3e-2
    worst = float((found - expected).abs().max())
    return worst <= allowed * max(float(expected.abs().max()), 1e-6)
