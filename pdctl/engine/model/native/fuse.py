"""Find the parts of a CPU model that a kernel of ours can compute, and let it.

What a part computes is found out by trying: its replacement must agree with it on random numbers, or it stays as it is.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch

from pdctl.engine.model.native.modules import ACTIVATIONS, Forward, GatedMlp, Norm, Rotation, rotated
from pdctl.engine.model.native.rows import Activation, Kernels, kernels
from pdctl.engine.model.products import agree

# Attributes with the number that an RMSNorm adds to the mean of the squares.
_EPSILONS = ("variance_epsilon", "eps", "epsilon")
_ROTATION = "apply_rotary_pos_emb"
_TRIED_ROWS = 3
# What parts raise that want other arguments.
_OTHERS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError)


class Fused(NamedTuple):
    """Numbers of modules, and of functions that rotate, which use a kernel."""

    norms: int
    gates: int
    rotations: int


def fuse(module: torch.nn.Module) -> Fused:
    """Use kernels in `module`. Nothing without a compiler, and with more than one thread: the kernels have one."""
    weight = next(module.parameters())
    functions = kernels(weight.dtype) if weight.device.type == "cpu" and torch.get_num_threads() == 1 else None
    if functions is None:
        return Fused(0, 0, 0)
    parts = list(module.modules())
    with torch.inference_mode():
        return Fused(
            sum(_use_norm(part, functions, weight.dtype) for part in parts),
            sum(_use_gate(part, functions, weight.dtype) for part in parts),
            sum(_use_rotation(code, weight.dtype) for code in {type(part).__module__ for part in parts}),
        )


def _use_norm(module: torch.nn.Module, functions: Kernels, dtype: torch.dtype) -> bool:
    """An RMSNorm has one weight and an epsilon. How it applies the weight is tried; the closest way is used."""
    weights = [weight for weight in module._parameters.values() if weight is not None]
    epsilon = next((value for name in _EPSILONS if isinstance(value := getattr(module, name, None), float)), None)
    if epsilon is None or len(weights) != 1 or weights[0].dim() != 1 or weights[0].dtype is not dtype:
        return False
    rows = _random(_TRIED_ROWS, weights[0].shape[0], dtype)
    expected = _tried(module, rows)
    if expected is None:
        return False
    ways = [
        Norm(functions, dtype, weights[0].float() + offset, epsilon, early, module.forward)
        for offset in (0.0, 1.0)
        for early in (False, True)
    ]
    closest = min(ways, key=lambda way: float((way(rows).float() - expected.float()).abs().sum()))
    return _use(module, closest, rows, expected)


def _use_gate(module: torch.nn.Module, functions: Kernels, dtype: torch.dtype) -> bool:
    """A gated MLP has down_proj, an activation, and gate_proj and up_proj or both in one."""
    down = getattr(module, "down_proj", None)
    activation = _activation(getattr(module, "act_fn", None) or getattr(module, "activation_fn", None))
    if type(down) is not torch.nn.Linear or down.weight.dtype is not dtype or activation is None:
        return False
    gate, up, both = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "gate_up_proj"))
    if type(gate) is type(up) is torch.nn.Linear:
        rows = _random(_TRIED_ROWS, gate.in_features, dtype)
        made = GatedMlp(functions, lambda rows: (gate(rows), up(rows)), activation, down)
    elif type(both) is torch.nn.Linear:
        rows = _random(_TRIED_ROWS, both.in_features, dtype)
        made = GatedMlp(functions, lambda rows: both(rows).chunk(2, -1), activation, down)
    else:
        return False
    expected = _tried(module, rows)
    return expected is not None and _use(module, made, rows, expected)


def _use_rotation(code: str, dtype: torch.dtype) -> bool:
    """The rotation is a function of the module with a family's code."""
    module = sys.modules.get(code)
    original = getattr(module, _ROTATION, None)
    if module is None or original is None:
        return False
    if isinstance(original, Rotation):
        return True
    size = 16
    q, k = _random(4 * _TRIED_ROWS, size, dtype).view(1, 4, -1, size), _random(_TRIED_ROWS, size, dtype)[None]
    # Both halves differ here, as they do not in a model: a function that reads only one of them computes another thing.
    cos, sin = _random(_TRIED_ROWS, size, dtype), _random(_TRIED_ROWS, size, dtype) ** 2
    found = rotated(q, k, cos, sin)
    try:
        expected = original(q, k, cos, sin)
    except _OTHERS:
        return False
    if found is None or not all(_agrees(one, other) for one, other in zip(found, expected, strict=False)):
        return False
    setattr(module, _ROTATION, Rotation(original))
    return True


def _activation(function: object) -> Activation | None:
    """The known activation that this function computes."""
    if not callable(function):
        return None
    numbers = torch.linspace(-9, 9, 200)
    try:
        found = function(numbers)
    except _OTHERS:
        return None
    return next((kind for kind, known in ACTIVATIONS.items() if _agrees(known(numbers), found)), None)


def _tried(module: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor | None:
    try:
        found = module(rows)
    except _OTHERS:
        return None
    return found if isinstance(found, torch.Tensor) else None


def _use(module: torch.nn.Module, made: Forward, rows: torch.Tensor, expected: torch.Tensor) -> bool:
    if not _agrees(made(rows), expected):
        return False
    module.forward = made
    return True


def _agrees(found: torch.Tensor, expected: object) -> bool:
    return (
        isinstance(expected, torch.Tensor)
        and found.dtype is expected.dtype
        and found.shape == expected.shape
        and agree(found, expected)
    )


def _random(rows: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """[1, rows, size], with a mean that is not 0."""
    return (torch.randn(1, rows, size, generator=torch.Generator().manual_seed(rows)) + 0.25).to(dtype)
