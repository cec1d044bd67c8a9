"""Faster matrix products in the linear layers of a CPU model.

Suitable weights are packed for oneDNN, and the packed copy replaces the plain one. Layers that get the same input are
packed together, as one product. The others use the fastest plain way for their number of rows. Which is best for a
shape says the host's table (ways.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeGuard

import torch
from torch.nn.functional import linear

from pdctl.engine.model.products import DTYPES, PLAIN_WAYS, ROW_STEPS, agree, pack, packs, padded
from pdctl.engine.model.ways import Size, Ways, choose

# Below this, calls cost more than products, and `linear` has the cheapest call. It rounds by rows, which has never
# changed a token in float32; in bfloat16 it can.
_FEWEST_ELEMENTS = {torch.float32: 1 << 17, torch.bfloat16: 1}
# Names of a module's children that its forward gives the same tensor, one after the other.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, slots=True)
class Sped:
    """What speed_up did: numbers of layers, and `kept_bytes`, the packed weights whose plain ones remain."""

    packed: int
    plain: int
    kept_bytes: int


@dataclass(frozen=True, slots=True)
class _Group:
    """Layers that are computed as one product; most groups have one layer."""

    layers: tuple[torch.nn.Linear, ...]

    @property
    def size(self) -> Size:
        return sum(layer.weight.shape[0] for layer in self.layers), self.layers[0].weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].weight.dtype

    @property
    def bytes(self) -> int:
        return self.size[0] * self.size[1] * self.dtype.itemsize

    def weight(self) -> torch.Tensor:
        weights = [layer.weight.detach() for layer in self.layers]
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    def bias(self) -> torch.Tensor | None:
        biases = [layer.bias.detach() for layer in self.layers if layer.bias is not None]
        return torch.cat(biases) if biases else None


class Watch:
    """Notes the input of every linear layer of `module` while a forward pass runs within it."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._inputs: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def __enter__(self) -> Watch:
        """Begin to watch."""
        layers = [layer for layer in self._module.modules() if type(layer) is torch.nn.Linear]
        self._hooks = [layer.register_forward_pre_hook(self._note) for layer in layers]
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()

    def _note(self, layer: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if given:
            self._inputs[layer] = (given[0], given[0].clone())

    def called(self, layer: torch.nn.Module) -> bool:
        """Whether the layer was called as a module; other code may read its weight instead."""
        return layer in self._inputs

    def same_input(self, layers: list[torch.nn.Linear]) -> bool:
        """Whether all were called with one tensor, which did not change in between."""
        (first, value), *others = (self._inputs[layer] for layer in layers)
        return all(given is first and torch.equal(seen, value) for given, seen in others)


def speed_up(module: torch.nn.Module, watch: Watch, folder: Path | None, room: int) -> Sped:
    """Use faster products in a CPU model's layers, after a forward pass within `watch`.

    `folder`: of the host's table; None: fixed rules. `room`: bytes that copies of shared weights may use in addition.
    """
    groups = list(_groups(module, watch))
    if not groups:
        return Sped(0, 0, 0)
    ways = choose((group.size for group in groups), groups[0].dtype, folder)
    shared = _shared(module)
    packed = plain = kept = 0
    for group in groups:
        held = any(id(layer.weight) in shared for layer in group.layers)
        found = _packed(group, copied=not held or kept + group.bytes <= room) if ways[group.size].packed else None
        if found is None:
            _use_plain(group, ways[group.size])
            plain += len(group.layers)
            continue
        _use_packed(group, found, released=not held)
        packed += len(group.layers)
        kept += group.bytes * (held and found.copied)
    return Sped(packed, plain, kept)


def product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ways: Ways) -> torch.Tensor:
    """rows [..., in] times a plain weight [out, in] transposed, plus bias: equals torch.nn.functional.linear."""
    count = rows.numel() // rows.shape[-1]
    if not 0 < count <= ROW_STEPS[-1]:
        return linear(rows, weight, bias)
    name = next(name for most, name in zip(ROW_STEPS, ways.plain, strict=True) if count <= most)
    if name == "linear":
        return linear(rows, weight, bias)
    found = PLAIN_WAYS[name](rows.reshape(count, rows.shape[-1]), weight)
    if bias is not None:
        found += bias
    return found.view(*rows.shape[:-1], weight.shape[0])


class PackedProduct:
    """rows [..., in] times a weight in oneDNN's way, plus bias: [..., out]. `copied`: the weight is a packed copy."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, copied: bool) -> None:
        self.copied = copied
        self._weight, self._bias, self._outputs = pack(weight) if copied else weight, bias, weight.shape[0]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """One product for all rows."""
        shape = rows.shape
        flat = rows.reshape(-1, shape[-1])
        if flat.shape[0] == 0:
            return rows.new_empty(*shape[:-1], self._outputs)
        return padded(flat, self._weight, self._bias).view(*shape[:-1], self._outputs)


class _Parts:
    """The product of several layers with the same input: the first call computes all, each layer takes its own part."""

    def __init__(self, whole: PackedProduct, sizes: list[int]) -> None:
        self._whole, self._sizes = whole, sizes
        self._input: torch.Tensor | None = None
        self._parts: dict[int, torch.Tensor] = {}

    def part(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        """The output of layer `index`. Each part is given once: a caller may change its input or output in place."""
        if self._input is not rows or index not in self._parts:
            self._parts = dict(enumerate(self._whole(rows).split_with_sizes(self._sizes, -1)))
            self._input = rows
        found = self._parts.pop(index)
        if not self._parts:
            self._input = None
        return found


def _packed(group: _Group, copied: bool) -> PackedProduct | None:
    """The group's product in oneDNN's way; None if it computes something else than `linear`, which must not happen."""
    weight, bias = group.weight(), group.bias()
    made = PackedProduct(weight, bias, copied)
    with torch.inference_mode():
        rows = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
        return made if agree(made(rows), linear(rows, weight, bias)) else None


def _use_packed(group: _Group, whole: PackedProduct, released: bool) -> None:
    parts = _Parts(whole, [layer.weight.shape[0] for layer in group.layers])
    for index, layer in enumerate(group.layers):
        layer.forward = whole if len(group.layers) == 1 else partial(parts.part, index)  # type: ignore[method-assign,assignment]
        if released:
            # Empty, but of the type and device that model code may ask for.
            layer.weight = torch.nn.Parameter(layer.weight.new_empty(0, layer.in_features), requires_grad=False)


def _use_plain(group: _Group, ways: Ways) -> None:
    for layer in group.layers:
        layer.forward = partial(  # type: ignore[method-assign]
            product, weight=layer.weight, bias=layer.bias, ways=ways
        )


def _shared(module: torch.nn.Module) -> set[int]:
    """Weights that several modules use, such as embeddings that are also the vocabulary projection."""
    seen: set[int] = set()
    shared: set[int] = set()
    for part in module.modules():
        for weight in part._parameters.values():
            (shared if id(weight) in seen else seen).add(id(weight))
    return shared


def _groups(module: torch.nn.Module, watch: Watch) -> Iterator[_Group]:
    """Suitable layers, siblings together, that are large enough."""
    found: list[_Group] = []
    done: set[torch.nn.Module] = set()
    for parent in module.modules():
        for names in _SIBLINGS:
            layers = [layer for name in names if _suits(layer := getattr(parent, name, None), watch)]
            if len(layers) == len(names) and _fits_together(layers, watch):
                done.update(layers)
                found.append(_Group(tuple(layers)))
    found += [_Group((layer,)) for layer in module.modules() if layer not in done and _suits(layer, watch)]
    return (group for group in found if group.size[0] * group.size[1] >= _FEWEST_ELEMENTS[group.dtype])


def _fits_together(layers: list[torch.nn.Linear], watch: Watch) -> bool:
    biased = {layer.bias is not None for layer in layers}
    kinds = {layer.weight.dtype for layer in layers}
    return len(biased) == len(kinds) == 1 and packs(layers[0].weight.dtype) and watch.same_input(layers)


def _suits(layer: object, watch: Watch) -> TypeGuard[torch.nn.Linear]:
    if type(layer) is not torch.nn.Linear or not watch.called(layer):
        return False
    weight = layer.weight
    return weight.device.type == "cpu" and weight.dtype in DTYPES
