"""Choose the attention backend of an engine, and say why.

A backend must be installed, must take every layer of the model, and must agree with `gather` on random data on this
device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from pdctl.engine.model.attention import BACKENDS, Backend, open_backend
from pdctl.engine.model.attention.batch import Batch, Call, LayerNeed, PoolNeed

# Of the largest output, which is about 1 for single tokens.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
# Sequences of the check: tokens in the pool, and new ones.
_MIXED = ((0, 1), (300, 1), (0, 70), (90, 45), (700, 1))
_SINGLE = ((0, 1), (300, 1), (513, 1))


# On a CPU, Triton and varlen have nothing to offer.
_ON_CPUS = ["native", "gather"]


class Chosen(NamedTuple):
    """The backend and the reason for it."""

    backend: Backend
    reason: str


class AttentionRefused(Exception):
    """The backend that the topology names cannot serve the model; the message gives the reason."""


def choose(wanted: str, needs: Iterable[LayerNeed], pool: PoolNeed, device: torch.device) -> Chosen:
    """`wanted`: a name in BACKENDS, or "auto" for the first that works. Raises AttentionRefused."""
    if wanted != "auto":
        chosen = first_of([wanted], needs, pool, device)
        return chosen._replace(reason="named in the topology")
    names = _ON_CPUS if device.type == "cpu" else [name for name in BACKENDS if name != "native"]
    return first_of(names, needs, pool, device)


def first_of(names: list[str], needs: Iterable[LayerNeed], pool: PoolNeed, device: torch.device) -> Chosen:
    """The first of these backends that can serve the layers, and why not those before. Raises AttentionRefused."""
    layers = sorted(set(needs), key=str)
    against: list[str] = []
    for name in names:
        found, reason = _tried(name, layers, pool, device)
        if found is not None:
            why = "always right" if name == "gather" else "agrees with gather on this device"
            return Chosen(found, "; ".join([why, *against]))
        against.append(f"not {name}: {reason}")
    raise AttentionRefused(f"attention cannot be computed: {'; '.join(against)}")


def _tried(name: str, layers: list[LayerNeed], pool: PoolNeed, device: torch.device) -> tuple[Backend | None, str]:
    """The backend, or None and the reason."""
    try:
        backend = open_backend(name, device)
        if reason := next(filter(None, (backend.refuses(layer, pool) for layer in layers)), ""):
            return None, reason
        if name != "gather":
            for layer in layers:
                check(backend, layer, pool, device)
    except ImportError as failure:
        return None, f"it is not installed ({failure})"
    # Kernels are compiled and run here for the first time, and libraries raise what they like.
    except Exception as failure:  # noqa: BLE001
        return None, " ".join(str(failure).split())[:200] or type(failure).__name__
    return backend, ""


def check(backend: Backend, layer: LayerNeed, pool: PoolNeed, device: torch.device) -> None:
    """Raise RuntimeError unless the backend agrees with `gather` on a mixed batch and on one of single tokens."""
    reference = open_backend("gather", device)
    for rows in (_MIXED, _SINGLE):
        batch = _batch(rows, pool.block_size, device)
        query, keys, values, call = _arguments(layer, pool, batch, device)
        reference.begin(batch)
        sinks = None if call.sinks is None else call.sinks.float()
        expected = reference.attend(query.float(), keys.float(), values.float(), batch, call._replace(sinks=sinks))
        batch.notes.clear()
        backend.begin(batch)
        found = backend.attend(query, keys, values, batch, call)
        worst = float((found.float() - expected).abs().max())
        allowed = _TOLERANCE[pool.dtype] * max(1.0, float(expected.abs().max()))
        if not worst <= allowed:
            raise RuntimeError(f"it differs from gather by {worst:.3g} where {allowed:.3g} is allowed")


def _batch(rows: tuple[tuple[int, int], ...], block_size: int, device: torch.device) -> Batch:
    used = np.array([-(-(context + count) // block_size) for context, count in rows])
    width = int(used.max())
    # Every second block, the last sequence's first: scattered, and followed by blocks of nobody.
    order = 2 * np.arange(int(used.sum()), dtype=np.int32)[::-1] + 1
    table = np.zeros((len(rows), width), dtype=np.int32)
    for index, (end, count) in enumerate(zip(used.cumsum().tolist(), used.tolist(), strict=True)):
        table[index, :count] = order[end - count : end]
    return Batch.of(rows, table, block_size, device)


def _arguments(
    layer: LayerNeed, pool: PoolNeed, batch: Batch, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Call]:
    """Query, keys, values and call for Backend.attend. Slots of no sequence are NaN, as they may be in an engine."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, pool.dtype)

    slots = (2 * int((-(-batch.host.lengths // batch.block_size)).sum()) + 1) * batch.block_size
    keys, values = random(slots, layer.kv_heads, layer.key_dim), random(slots, layer.kv_heads, layer.value_dim)
    nobody = torch.ones(slots, dtype=torch.bool)
    for length, blocks in zip(batch.host.lengths.tolist(), batch.host.table, strict=True):
        own = torch.from_numpy(blocks.astype(np.int64))[:, None] * batch.block_size + torch.arange(batch.block_size)
        nobody[own.flatten()[:length]] = False
    keys[nobody.to(device)] = torch.nan
    values[nobody.to(device)] = torch.nan
    query = random(layer.heads, int(batch.host.starts[-1]), layer.key_dim).transpose(0, 1)
    sinks = random(layer.heads) if layer.has_sinks else None
    return query, keys, values, Call(layer.key_dim**-0.5, layer.window, layer.softcap, sinks)
