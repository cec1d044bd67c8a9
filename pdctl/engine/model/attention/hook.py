"""transformers' AttentionInterface over the paged pool.

Model code calls `attend` with rotated q, k, v of all packed tokens. `attend` writes k and v to the pool, and the chosen
backend computes attention for each sequence over its own blocks. The step's context is a module global, because some
models drop keyword arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pdctl.engine.cache.kv_pool import KvPool
from pdctl.engine.model.attention import Backend
from pdctl.engine.model.attention.batch import Batch, Call, LayerNeed
from pdctl.engine.model.native.rows import kernels

NAME = "pdctl"


@dataclass(slots=True)
class Step:
    """The context of one forward pass. `first_layer`: the first one whose KV the pool has. `exchange`: makes the keys
    and values [rows, n] of all ranks from those of this one, which has not all rows of the step."""

    pool: KvPool
    backend: Backend
    batch: Batch
    first_layer: int = 0
    exchange: Callable[[torch.Tensor], torch.Tensor] | None = None


class HookCall(NamedTuple):
    """What a layer asks for, with the mask that transformers made for it, if any."""

    layer: int
    need: LayerNeed
    mask: torch.Tensor | None


class HookLog:
    """Records which layers call the hook, and what they need, instead of computing. For the check at load."""

    def __init__(self) -> None:
        self.calls: list[HookCall] = []


_current: Step | HookLog | None = None


def set_context(context: Step | HookLog | None) -> None:
    """Set the context of the next forward pass."""
    global _current
    _current = context


def is_in_step() -> bool:
    """Whether a step of an engine is being computed."""
    return isinstance(_current, Step)


def register() -> None:
    """Register `attn_implementation="pdctl"`. Models make no mask for it; masking is done by the backends."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    # cuDNN makes a plan for each new shape, and the KV length changes in each step: 4 ms per layer (H200, torch 2.11).
    torch.backends.cuda.enable_cudnn_sdp(False)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """The hook. query [1, H, T, D], key and value [1, Hk, T, D]; returns [1, T, H, Dv]."""
    assert _current is not None, "a forward pass without a batch context"
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    layer = int(str(module.layer_idx))
    if isinstance(_current, HookLog):
        sizes = (q.shape[1], k.shape[1], k.shape[2], v.shape[2])
        need = LayerNeed(*sizes, sliding_window, softcap, s_aux is not None)
        _current.calls.append(HookCall(layer, need, attention_mask))
        return q.new_zeros(1, q.shape[0], q.shape[1], v.shape[2]), None
    if _current.exchange is not None:
        k, v = _exchanged(k, v, _current.exchange)
    plane = layer - _current.first_layer
    keys, values = _current.pool.keys[plane], _current.pool.values[plane]
    for rows, pooled in ((k, keys), (v, values)):
        _write(rows, pooled, _current.batch.write_slots)
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    call = Call(scale, sliding_window, softcap, s_aux)
    return _current.backend.attend(q, keys, values, _current.batch, call)[None], None


def _exchanged(
    k: torch.Tensor, v: torch.Tensor, exchange: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k and v [T, Hk, D] of all rows, in one exchange."""
    found = exchange(torch.cat([k.flatten(1), v.flatten(1)], 1))
    width = k[0].numel()
    return found[:, :width].reshape(-1, *k.shape[1:]), found[:, width:].reshape(-1, *v.shape[1:])


def _write(rows: torch.Tensor, plane: torch.Tensor, slots: torch.Tensor) -> None:
    """Copy rows [T, Hk, D] to these slots of a layer's plane."""
    functions = kernels(plane.dtype) if plane.device.type == "cpu" and rows.dtype is plane.dtype else None
    if functions is None or not functions.place(rows, plane, slots):
        plane.index_copy_(0, slots, rows)
