"""Attention over the paged KV pool: one protocol, one file per backend.

`hook` connects transformers' models to a backend; `choice` picks the backend when an engine starts and says why. A
backend's file is imported when it is chosen. To add one: a file with `open_backend`, and a row in `BACKENDS`.
"""

from __future__ import annotations

import importlib
from typing import Protocol, cast

import torch

from pdctl.engine.model.attention.batch import Batch, Call, LayerNeed, PoolNeed


class Backend(Protocol):
    """One way to compute attention.

    `is_capturable`: a CUDA graph can hold `attend` for a batch of single new tokens, and a replay reads the batch's
    device tensors anew. `begin` is not part of a graph.
    """

    name: str
    is_capturable: bool

    def refuses(self, need: LayerNeed, pool: PoolNeed) -> str:
        """Why this backend cannot compute such a layer over such a pool; "" if it can."""
        ...

    def begin(self, batch: Batch) -> None:
        """Prepare for the layers of one step. On a GPU the step before it may still compute: what that reads on the
        device may only be changed by what is queued there."""
        ...

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, call: Call
    ) -> torch.Tensor:
        """query [T, H, D] over one layer's planes [slots, Hk, D] and [slots, Hk, Dv]; returns [T, H, Dv]."""
        ...


class Kind(Protocol):
    """The interface of a backend's module."""

    def open_backend(self, device: torch.device) -> Backend:
        """Open the backend. Raises ImportError or RuntimeError with the reason if it cannot work here."""
        ...


# By the name in a topology, in the order in which `auto` tries them: its module.
BACKENDS = {
    "flashinfer": "flashinfer",
    "varlen": "varlen",
    "triton": "triton_paged",
    "native": "native",
    "gather": "gather",
}


def open_backend(name: str, device: torch.device) -> Backend:
    """Import and open a known backend. Raises ImportError or RuntimeError with the reason if it cannot work here."""
    module = importlib.import_module(f"{__name__}.{BACKENDS[name]}")
    return cast(Kind, module).open_backend(device)
