"""Attention on CPUs by our own compiled kernel. A row's result is the same bits whatever else is in the batch, and
whether its token is computed as part of a prompt or alone."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np
import torch

from pdctl.engine.model.attention.batch import Batch, Call, Ints, LayerNeed, PoolNeed
from pdctl.engine.model.native import NotCompiled, library

_FUNCTIONS = {torch.float32: "pdctl_attend_float", torch.bfloat16: "pdctl_attend_bfloat16"}
# As in attention.cpp.
_LARGEST_HEAD = 256


class _Layer(ctypes.Structure):
    """`Layer` in attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("query_row", "query_head", "slot", "head", "value_slot", "value_head")),
        *(
            (name, ctypes.c_int32)
            for name in ("block_size", "heads", "kv_heads", "size", "value_size", "window")
        ),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )  # fmt: skip


class _Rows(NamedTuple):
    """A batch's numbers, which must live as long as their addresses are used, and these addresses."""

    starts: Ints
    lengths: Ints
    table: Ints
    arguments: tuple[int, int, int, int, int]


class NativeBackend:
    """See Backend."""

    name = "native"
    is_capturable = False

    def __init__(self, kernels: ctypes.CDLL) -> None:
        self._width = int(kernels.pdctl_width())
        self._functions = {}
        for dtype, name in _FUNCTIONS.items():
            function = kernels[name]
            function.restype = None
            pointers = [ctypes.c_void_p] * 5
            function.argtypes = [
                ctypes.POINTER(_Layer), *pointers, ctypes.c_int32, *([ctypes.c_void_p] * 3), ctypes.c_int64,
            ]  # fmt: skip
            self._functions[dtype] = function
        self._layers: dict[object, _Layer] = {}
        self._rows: _Rows | None = None

    def refuses(self, need: LayerNeed, pool: PoolNeed) -> str:
        """See Backend.refuses."""
        if pool.dtype not in _FUNCTIONS:
            return f"it does not compute in {str(pool.dtype).removeprefix('torch.')}"
        for size in (need.key_dim, need.value_dim):
            if size % self._width or size > _LARGEST_HEAD:
                return f"heads of {size} numbers are not a multiple of {self._width} up to {_LARGEST_HEAD}"
        if torch.get_num_threads() > 1:
            return f"it uses one thread, and the engine has {torch.get_num_threads()}"
        return ""

    def begin(self, batch: Batch) -> None:
        """See Backend.begin."""
        starts, lengths, table = (np.ascontiguousarray(numbers, dtype=np.int32) for numbers in batch.host)
        addresses = (len(lengths), starts.ctypes.data, lengths.ctypes.data, table.ctypes.data, table.shape[1])
        self._rows = _Rows(starts, lengths, table, addresses)

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, call: Call
    ) -> torch.Tensor:
        """See Backend.attend."""
        assert self._rows is not None
        if query.stride(2) != 1:
            query = query.contiguous()
        out = query.new_empty(query.shape[0], query.shape[1], values.shape[2])
        sinks = None if call.sinks is None else call.sinks.float().contiguous()
        layer = self._layer(query, keys, values, batch.block_size, call)
        self._functions[query.dtype](
            layer, query.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(),
            None if sinks is None else sinks.data_ptr(), *self._rows.arguments,
        )  # fmt: skip
        return out

    def _layer(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, block_size: int, call: Call
    ) -> _Layer:
        numbers = (
            *query.stride()[:2], *keys.stride()[:2], *values.stride()[:2], block_size, query.shape[1], keys.shape[1],
            keys.shape[2], values.shape[2], call.window or 0, call.scale, call.softcap or 0.0,
        )  # fmt: skip
        found = self._layers.get(numbers)
        if found is None:
            if len(self._layers) > 256:
                self._layers.clear()
            found = self._layers[numbers] = _Layer(*numbers)
        return found


def open_backend(device: torch.device) -> NativeBackend:
    """See Kind.open_backend."""
    if device.type != "cpu":
        raise RuntimeError("it computes on CPUs")
    try:
        return NativeBackend(library())
    except NotCompiled as failure:
        raise RuntimeError(str(failure)) from failure
