"""Ways to compute rows [n, in] times a weight [out, in] transposed, on the CPU.

A packed weight is fastest on most CPUs: in float32 with our own kernel (native/products.cpp), if there is a compiler,
else with oneDNN. Both compute a row with the same bits whatever other rows are computed with it, packed or not; oneDNN
except for a single row alone, so fewer rows than four are padded. This is also faster: one, two and four rows took 39,
49 and 31 ms (262,144 outputs, AMD EPYC of family 25 model 17). With AMX oneDNN adds up in another order for up to 36
rows than for more (3,072 x 1,024 in bfloat16, Intel family 6 model 167), so there it gets blocks of 64 rows. MKL's
methods round differently for different numbers of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Literal, TypeVar

import torch
from torch.nn.functional import linear, pad

from pdctl.engine.model.native.panels import Panels, Products, products

PlainName = Literal["linear", "transposed", "pieces"]
Way = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Packed = TypeVar("Packed")

# A plain weight's way is chosen for up to each of these numbers of rows; `linear` computes more.
ROW_STEPS = (1, 4, 16, 64)
_PIECE = 2048
_FEWEST_ROWS = 4
# Rows that oneDNN gets at once, tried one after the other: all, or as many as always have one kernel.
_ALL = 0
_BLOCKS = (_ALL, 64)
DTYPES = (torch.float32, torch.bfloat16)
# What is tried on this CPU, in less than 0.1 s: [outputs, inputs], and numbers of rows.
_SHAPES_TRIED = ((256, 640), (128, 3072))
_ROWS_TRIED = (1, 2, 3, 5, 8, 16, 17, 32, 33, 36, 40, 64, 65, 100, 130)


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
    return _by_onednn(rows, weight, bias, block_rows(rows.dtype) or _ALL)


def _by_onednn(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, block: int) -> torch.Tensor:
    """`block`: rows at once, the last ones padded to as many; _ALL: any number, padded to _FEWEST_ROWS."""
    if block == _ALL:
        return _padded_to(_FEWEST_ROWS, rows, weight, bias)
    if rows.shape[0] <= block:
        return _padded_to(block, rows, weight, bias)
    return torch.cat([_padded_to(block, piece, weight, bias) for piece in torch.split(rows, block)])


def _padded_to(least: int, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    count = rows.shape[0]
    wide = pad(rows, (0, 0, 0, least - count)) if count < least else rows
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(wide, weight, bias, "none", [], "")
    return product[:count]


def pack(weight: torch.Tensor) -> torch.Tensor | Panels:
    """A copy of a weight in the layout of our kernel, or in oneDNN's own, an opaque tensor."""
    own = products(weight.dtype)
    if own is not None:
        return own.pack(weight)
    return _reordered(weight)


def _reordered(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def packer(dtype: torch.dtype) -> str:
    """What packs weights of this type."""
    return "oneDNN" if products(dtype) is None else "native"


@lru_cache(maxsize=8)
def packs(dtype: torch.dtype) -> bool:
    """Whether weights of this type can be packed on this CPU, with equal bits in every batch."""
    if dtype not in DTYPES:
        return False
    if products(dtype) is None:
        return block_rows(dtype) is not None
    return same_bits(padded, pack, dtype)


@lru_cache(maxsize=8)
def block_rows(dtype: torch.dtype) -> int | None:
    """As how many rows at once oneDNN gives each row the same bits in every batch; None: it cannot."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    try:
        ways = {block: partial(_by_onednn, bias=None, block=block) for block in _BLOCKS}
        return next((block for block, way in ways.items() if same_bits(way, _reordered, dtype)), None)
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return None


def same_bits(
    multiply: Callable[[torch.Tensor, torch.Tensor | Packed], torch.Tensor],
    pack: Callable[[torch.Tensor], Packed],
    dtype: torch.dtype,
) -> bool:
    """Whether rows have the same bits for every number of rows, packed or not, and equal `linear` but for rounding.

    Each sum of the first product would be 0 without rounding, so that only the order of its terms decides its bits:
    with terms at random, bfloat16 hides most other orders. CPUs without bfloat16 in hardware round by rows as well.
    """
    numbers = torch.Generator().manual_seed(1)
    for outputs, inputs in _SHAPES_TRIED:
        rows, weight = _cancelling(_ROWS_TRIED[-1], outputs, inputs, dtype, numbers)
        packed = pack(weight)
        whole = multiply(rows, packed)
        if not all(torch.equal(multiply(rows[:n], form), whole[:n]) for n in _ROWS_TRIED for form in (packed, weight)):
            return False
    rows, weight = (torch.randn(count, 640, generator=numbers).to(dtype) for count in (100, 512))
    return agree(multiply(rows, pack(weight)), linear(rows, weight))


def _cancelling(
    count: int, outputs: int, inputs: int, dtype: torch.dtype, numbers: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and a weight in which each term of a sum has its opposite at a random place."""
    order = torch.randperm(inputs // 2, generator=numbers)
    rows, weight = (torch.randn(size, inputs // 2, generator=numbers) for size in (count, outputs))
    return torch.cat([rows, rows[:, order]], 1).to(dtype), torch.cat([weight, -weight[:, order]], 1).to(dtype)


def agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two products of the same numbers differ by no more than rounding."""
    allowed = 1e-4 if expected.dtype is torch.float32 else 3e-2
    worst = float((found - expected).abs().max())
    return worst <= allowed * max(float(expected.abs().max()), 1e-6)
