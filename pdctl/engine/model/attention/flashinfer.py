"""FlashInfer's kernels (Ye et al. 2025), where the package is installed: a plan for each kind of layer and step."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch

from pdctl.engine.model.attention.batch import Batch, Call, LayerNeed, PoolNeed
from pdctl.engine.model.copies import to_device

_WORKSPACE_BYTES = 256 << 20
_HEADS = (64, 128, 256)


class Wrapper(Protocol):
    """FlashInfer's wrappers of decode and prefill kernels over a paged cache."""

    def plan(self, *tables: torch.Tensor | int, **options: object) -> None:
        """Decide on the host how the next runs are split."""
        ...

    def run(self, query: torch.Tensor, pages: tuple[torch.Tensor, torch.Tensor], /) -> torch.Tensor:
        """query [T, H, D] over pages [blocks, block size, Hk, D]; returns [T, H, D]."""
        ...


class Module(Protocol):
    """What is used of the package."""

    def BatchDecodeWithPagedKVCacheWrapper(self, *args: object, **options: object) -> Wrapper:
        """See Wrapper."""
        ...

    def BatchPrefillWithPagedKVCacheWrapper(self, *args: object, **options: object) -> Wrapper:
        """See Wrapper."""
        ...


class _Layers(NamedTuple):
    """Layers with one plan."""

    heads: int
    kv_heads: int
    size: int
    scale: float
    window: int | None
    softcap: float | None
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Tables:
    """A batch in FlashInfer's form, on the host: `rows` and `pages` [B + 1] are cumulative, `last` [B] is the number of
    tokens in each sequence's last block."""

    rows: torch.Tensor
    pages: torch.Tensor
    blocks: torch.Tensor
    last: torch.Tensor


class FlashInferBackend:
    """See Backend."""

    name = "flashinfer"
    is_capturable = True

    def __init__(self, module: Module, device: torch.device) -> None:
        self._module = module
        self._device = device
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrappers: dict[tuple[_Layers, int, bool], Wrapper] = {}
        # Plans are made before a graph is captured or replayed, so all kinds of layers must be known by then.
        self._known: dict[_Layers, Wrapper] = {}
        self._copied: torch.cuda.Event | None = None

    def refuses(self, need: LayerNeed, pool: PoolNeed) -> str:
        """See Backend.refuses."""
        if pool.dtype not in (torch.float16, torch.bfloat16):
            return f"it computes in float16 and bfloat16, not in {str(pool.dtype).removeprefix('torch.')}"
        if need.key_dim != need.value_dim or need.key_dim not in _HEADS:
            return f"it does not compute heads of {need.key_dim} with values of {need.value_dim}"
        return "it has no attention sinks" if need.has_sinks else ""

    def begin(self, batch: Batch) -> None:
        """See Backend.begin."""
        if self._known:
            if self._copied is not None:
                # A wrapper copies its plan from memory that its next plan uses again.
                self._copied.synchronize()
            tables = _tables(batch)
            self._known = {layers: self._planned(layers, batch, tables) for layers in self._known}
            self._note_copies()

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, call: Call
    ) -> torch.Tensor:
        """See Backend.attend."""
        layers = _Layers(
            query.shape[1], keys.shape[1], query.shape[2], call.scale, call.window, call.softcap, query.dtype
        )
        if layers not in self._known:
            self._known[layers] = self._planned(layers, batch, _tables(batch))
            self._note_copies()
        pages = (keys.view(-1, batch.block_size, *keys.shape[1:]), values.view(-1, batch.block_size, *values.shape[1:]))
        return self._known[layers].run(query.contiguous(), pages)

    def _note_copies(self) -> None:
        if self._device.type == "cuda":
            self._copied = torch.cuda.current_stream(self._device).record_event()

    def _planned(self, layers: _Layers, batch: Batch, tables: _Tables) -> Wrapper:
        is_decode = batch.longest_query == 1
        # A wrapper of a graph has buffers for its own batch size; others take any.
        key = (layers, batch.num_sequences if batch.is_static else 0, is_decode)
        if key not in self._wrappers:
            self._wrappers[key] = self._decoder(batch) if is_decode else self._prefiller()
        options: dict[str, object] = {
            "window_left": -1 if layers.window is None else layers.window - 1,
            "logits_soft_cap": layers.softcap or 0.0,
            "q_data_type": layers.dtype,
            "kv_data_type": layers.dtype,
            "sm_scale": layers.scale,
        }
        paged = (tables.pages, tables.blocks, tables.last)
        sizes = (layers.heads, layers.kv_heads, layers.size, batch.block_size)
        if is_decode:
            self._wrappers[key].plan(*paged, *sizes, **options)
        else:
            self._wrappers[key].plan(tables.rows, *paged, *sizes, causal=True, **options)
        return self._wrappers[key]

    def _prefiller(self) -> Wrapper:
        return self._module.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")

    def _decoder(self, batch: Batch) -> Wrapper:
        if not batch.is_static:
            return self._module.BatchDecodeWithPagedKVCacheWrapper(self._workspace, "NHD", use_tensor_cores=True)
        count, width = batch.table.shape

        def ints(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=self._device)

        return self._module.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=ints(count + 1),
            paged_kv_indices_buffer=ints(count * width),
            paged_kv_last_page_len_buffer=ints(count),
        )


def open_backend(device: torch.device) -> FlashInferBackend:
    """See Kind.open_backend."""
    module = cast(Module, importlib.import_module("flashinfer"))
    if device.type != "cuda":
        raise RuntimeError("it needs a GPU")
    return FlashInferBackend(module, device)


def _tables(batch: Batch) -> _Tables:
    starts, lengths, table = batch.host
    used = -(-lengths // batch.block_size)
    pages = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(used, out=pages[1:])
    is_used = np.arange(table.shape[1])[None] < used[:, None]
    last = (lengths - (used - 1) * batch.block_size).astype(np.int32)
    blocks = to_device(torch.from_numpy(table[is_used]), batch.lengths.device)
    return _Tables(torch.from_numpy(starts.copy()), torch.from_numpy(pages), blocks, torch.from_numpy(last))
