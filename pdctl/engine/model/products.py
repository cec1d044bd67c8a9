"""Ways to compute rows [n, in] times a weight [out, in] transposed, on the CPU.

A packed weight is fastest on most CPUs: in float32 with our own kernel (native/products.cpp), if there is a compiler,
else with oneDNN. Both compute a row with the same bits whatever other rows are computed with it, packed or not; oneDNN
except for a single row alone, so fewer rows than four are padded. This is also faster: one, two and four rows took 39,
49 and 31 ms (262,144 outputs, AMD EPYC of family 25 model 17). MKL's methods round differently for different numbers of
rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
from torch.nn.functional import linear, pad

from pdctl.engine.model.native.panels import Panels, Products, products

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


def padded(rows: torch.Tensor, weight: torch.Tensor | Panels, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product with a packed or plain weight by our kernel or oneDNN; at least one row."""
    if isinstance(weight, Panels):
        own: Products | None = weight.kernel
    else:
        own = None if weight.is_mkldnn else products(rows.dtype)
    if own is not None:
        found = own.multiply(rows, weight)
        return found if bias is None else found.add_(bias)
    assert not isinstance(weight, Panels)
    count = rows.shape[0]
    wide = pad(rows, (0, 0, 0, _FEWEST_ROWS - count)) if count < _FEWEST_ROWS else rows
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(wide, weight, bias, "none", [], "")
    return product[:count]


def pack(weight: torch.Tensor) -> torch.Tensor | Panels:
    """A copy of a weight in the layout of our kernel, or in oneDNN's own, an opaque tensor."""
    own = products(weight.dtype)
    if own is not None:
        return own.pack(weight)
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def packer(dtype: torch.dtype) -> str:
    """What packs weights of this type."""
    return "oneDNN" if products(dtype) is None else "native"


@lru_cache(maxsize=8)
def packs(dtype: torch.dtype) -> bool:
    """Whether weights of this type can be packed on this CPU, with equal bits in every batch."""
    without = products(dtype) is None and not torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if dtype not in DTYPES or without:
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
