"""Matrix products in float32 by our compiled kernel (products.cpp).

An output is one sum in the order of the inputs: the same bits for any number of rows, packed or not. It computes with
one thread.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

from pdctl.engine.model.native import NotCompiled, library


class Panels:
    """A weight [outputs, inputs] in the order in which the kernel reads it, and the kernel."""

    def __init__(self, values: torch.Tensor, outputs: int, kernel: Products) -> None:
        self.values, self.outputs, self.kernel = values, outputs, kernel


class Products:
    """The library's functions."""

    def __init__(self, kernels: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        kernels.pdctl_panel.restype = number
        self._panel = int(kernels.pdctl_panel())
        self._pack, self._multiply = kernels.pdctl_pack, kernels.pdctl_multiply
        self._pack.restype = self._multiply.restype = None
        self._pack.argtypes = [pointer, pointer, number, number]
        self._multiply.argtypes = [pointer] * 4 + [number] * 4

    def pack(self, weight: torch.Tensor) -> Panels:
        """A copy of a weight [outputs, inputs]."""
        outputs, inputs = weight.shape
        weight = weight.contiguous()
        panels = torch.empty(-(-outputs // self._panel) * self._panel, inputs)
        self._pack(weight.data_ptr(), panels.data_ptr(), outputs, inputs)
        return Panels(panels, outputs, self)

    def multiply(self, rows: torch.Tensor, weight: torch.Tensor | Panels) -> torch.Tensor:
        """rows [n, inputs] times a weight [outputs, inputs] transposed. A plain weight is packed again in each call."""
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        count, inputs = rows.shape
        if isinstance(weight, Panels):
            scratch, values, outputs = None, weight.values, weight.outputs
        else:
            values, outputs = weight.contiguous(), weight.shape[0]
            scratch = torch.empty(self._panel, inputs)
        assert values.shape[1] == inputs
        assert rows.dtype is values.dtype is torch.float32
        out = rows.new_empty(count, outputs)
        self._multiply(
            rows.data_ptr(), values.data_ptr(), out.data_ptr(), None if scratch is None else scratch.data_ptr(), count,
            rows.stride(0), inputs, outputs,
        )  # fmt: skip
        return out


def products(dtype: torch.dtype) -> Products | None:
    """The functions; None without a compiler, for other types, and with more than one thread."""
    return _products() if dtype is torch.float32 and torch.get_num_threads() == 1 else None


@lru_cache(maxsize=1)
def _products() -> Products | None:
    try:
        return Products(library())
    except NotCompiled:
        return None
