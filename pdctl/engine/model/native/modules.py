"""Norms, gated MLPs and rotary embeddings of transformers' models by our kernels.

Each calls what it replaces for tensors that its kernel does not take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch.nn import functional

from pdctl.engine.model.attention import hook
from pdctl.engine.model.native.rows import Activation, Kernels, kernels

ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.SILU: functional.silu,
    Activation.GELU: lambda x: functional.gelu(x, approximate="tanh"),
    Activation.RELU: functional.relu,
}

Forward = Callable[..., torch.Tensor]
Rotated = tuple[torch.Tensor, torch.Tensor]


class Norm:
    """RMSNorm of tensors of type `dtype`, with float32 factors [size]. `early`: see Kernels.normalize."""

    def __init__(
        self, functions: Kernels, dtype: torch.dtype, factors: torch.Tensor, epsilon: float, early: bool,
        original: Forward,
    ) -> None:  # fmt: skip
        self._functions, self._dtype, self._original = functions, dtype, original
        self._factors, self._epsilon, self._early, self._size = factors, epsilon, early, factors.shape[0]

    def __call__(self, rows: torch.Tensor, *others: object, **named: object) -> torch.Tensor:
        """See torch.nn.Module.forward."""
        if rows.dtype is self._dtype and rows.shape[-1] == self._size and not others and not named:
            found = self._functions.normalize(rows, self._factors, self._epsilon, self._early)
            if found is not None:
                return found
        return self._original(rows, *others, **named)


class GatedMlp:
    """down(activation(gate) * up), where `parts` computes gate and up."""

    def __init__(
        self, functions: Kernels, parts: Callable[[torch.Tensor], Iterable[torch.Tensor]], activation: Activation,
        down: Forward,
    ) -> None:  # fmt: skip
        self._functions, self._parts, self._activation, self._down = functions, parts, activation, down

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """See torch.nn.Module.forward."""
        gate, up = self._parts(rows)
        found = self._functions.gate(gate, up, self._activation)
        return self._down(ACTIVATIONS[self._activation](gate) * up if found is None else found)


class Rotate(Protocol):
    """transformers' apply_rotary_pos_emb: rotates q and k [1, heads, T, size]."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *others: Any, **named: Any
    ) -> Rotated:
        """Both rotated."""
        ...


class Rotation:
    """See Rotate. The function is shared by all models of a family, so only steps of an engine use the kernel."""

    def __init__(self, original: Rotate) -> None:
        self.original = original

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *others: Any, **named: Any
    ) -> Rotated:
        """See Rotate."""
        if hook.is_in_step() and not others and not named:
            found = rotated(q, k, cos, sin)
            if found is not None:
                return found
        return self.original(q, k, cos, sin, *others, **named)


def rotated(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Rotated | None:
    """q and k [1, heads, T, size] rotated by halves; None if the kernel does not take them."""
    functions = kernels(q.dtype)
    if functions is None or not q.dtype is k.dtype is cos.dtype is sin.dtype or q.device.type != "cpu":
        return None
    first, second = functions.rotate(q, cos, sin), functions.rotate(k, cos, sin)
    return None if first is None or second is None else (first, second)
