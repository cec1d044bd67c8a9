"""What models compute row by row, by our compiled kernels (rows.cpp), on tensors of the CPU.

They compute with one thread. A row's result is the same bits whatever other rows there are. Methods return None for a
layout of tensors that they do not take.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from functools import lru_cache

import torch

from pdctl.engine.model.native import NotCompiled, library

_NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
DTYPES = tuple(_NAMES)
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
# First what is read and written, then numbers and distances of rows.
_ROWS: list[type] = [_POINTER, _POINTER, *[_LONG] * 7]
_MORE: dict[str, list[type]] = {
    "normalize": [_POINTER, _FLOAT, _INT],
    "gate": [_POINTER, _INT],
    "rotate": [_POINTER, _POINTER, _LONG],
    "place": [_POINTER, _LONG],
    "largest": [],
}  # fmt: skip


class Activation(IntEnum):
    """As in rows.cpp. GELU: its approximation by tanh."""

    SILU = 0
    GELU = 1
    RELU = 2


class Kernels:
    """The library's functions for one type of numbers, of which all tensors are."""

    def __init__(self, kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
        self._normalize, self._gate, self._rotate, self._place, self._largest = (
            _function(kernels, f"pdctl_{name}_{_NAMES[dtype]}", more) for name, more in _MORE.items()
        )
        self._place.restype = _LONG

    def normalize(self, rows: torch.Tensor, weight: torch.Tensor, epsilon: float, early: bool) -> torch.Tensor | None:
        """RMSNorm of rows [..., size] that lie next to each other, or of [1, T, size] or [1, n, m, size]; the weight
        [size] is float32. `early`: normalised rows are rounded before they are multiplied by the weight."""
        size = weight.shape[0]
        layout: tuple[int, ...]
        if rows.is_contiguous():
            out = torch.empty_like(rows)
            layout = (rows.numel() // size, 1, size, size, 0, size, 0)
        elif rows.stride(-1) != 1 or rows.shape[0] != 1 or rows.dim() not in (3, 4):
            return None
        elif rows.dim() == 3:
            out = rows.new_empty(rows.shape)
            layout = (rows.shape[1], 1, size, rows.stride(1), 0, size, 0)
        else:
            out = _like(rows)
            _, n, m, _ = rows.shape
            layout = (m, n, size, rows.stride(2), rows.stride(1), out.stride(2), out.stride(1))
        self._normalize(rows.data_ptr(), out.data_ptr(), *layout, weight.data_ptr(), epsilon, early)
        return out

    def gate(self, gates: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor | None:
        """activation(gates) * up, both [T, size] or [1, T, size]."""
        shape = gates.shape
        if not gates.stride(-1) == up.stride(-1) == 1 or shape != up.shape or not _is_flat(shape):
            return None
        out = gates.new_empty(shape)
        size = shape[-1]
        self._gate(
            gates.data_ptr(), out.data_ptr(), shape[-2], 1, size, gates.stride(-2), up.stride(-2), size, 0,
            up.data_ptr(), activation,
        )  # fmt: skip
        return out

    def rotate(self, rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor | None:
        """Rotary embedding of rows [1, H, T, size] by halves, with cos and sin [1, T, size]."""
        _, heads, tokens, size = rows.shape
        wanted = (1, tokens, size)
        if rows.shape[0] != 1 or size % 2 or cos.shape != wanted or sin.shape != wanted or cos.stride() != sin.stride():
            return None
        if not rows.stride(3) == cos.stride(2) == 1:
            return None
        out = _like(rows)
        self._rotate(
            rows.data_ptr(), out.data_ptr(), tokens, heads, size, rows.stride(2), rows.stride(1), out.stride(2),
            out.stride(1), cos.data_ptr(), sin.data_ptr(), cos.stride(1),
        )  # fmt: skip
        return out

    def place(self, rows: torch.Tensor, plane: torch.Tensor, slots: torch.Tensor) -> bool:
        """Copy rows [T, heads, size] to the slots [T] int64 of plane [slots, heads, size]; False for another layout.
        Raises IndexError for a slot that does not exist."""
        if not rows.stride(2) == plane.stride(2) == slots.stride(0) == 1 or rows.shape[1:] != plane.shape[1:]:
            return False
        tokens, heads, size = rows.shape
        done = self._place(
            rows.data_ptr(), plane.data_ptr(), tokens, heads, size, rows.stride(0), rows.stride(1), plane.stride(0),
            plane.stride(1), slots.data_ptr(), plane.shape[0],
        )  # fmt: skip
        if done != tokens:
            raise IndexError(f"slot {int(slots[done])} of {plane.shape[0]}")
        return True

    def largest(self, rows: torch.Tensor) -> torch.Tensor | None:
        """The index of each row's largest number [T] of rows [T, size]: the first of equal ones, -1 beside a NaN."""
        if rows.dim() != 2 or rows.stride(1) != 1:
            return None
        out = torch.empty(rows.shape[0], dtype=torch.int64)
        self._largest(rows.data_ptr(), out.data_ptr(), rows.shape[0], 1, rows.shape[1], rows.stride(0), 0, 0, 0)
        return out


@lru_cache(maxsize=4)
def kernels(dtype: torch.dtype) -> Kernels | None:
    """The functions for this type; None without a compiler, and for other types."""
    if dtype not in _NAMES:
        return None
    try:
        return Kernels(library(), dtype)
    except NotCompiled:
        return None


def _function(kernels: ctypes.CDLL, name: str, more: list[type]) -> ctypes._NamedFuncPointer:
    function = kernels[name]
    function.restype = None
    function.argtypes = _ROWS + more
    return function


def _is_flat(shape: torch.Size) -> bool:
    return len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)


def _like(rows: torch.Tensor) -> torch.Tensor:
    """An empty tensor of this shape [1, n, m, size], in the order of its strides."""
    _, n, m, size = rows.shape
    return (
        rows.new_empty(rows.shape) if rows.stride(1) > rows.stride(2) else rows.new_empty(1, m, n, size).transpose(1, 2)
    )
