"""Layers over several ranks, each of which has some that follow each other: a stage.

A stage takes hidden states from the stage before it and passes them on to the next; the last one gives them back to the
first, which has the embeddings and the projection to the vocabulary (not if `Group.gives_back` is off: the first does
not wait then, and what it computes behind its layers means nothing). Modules that a stage does not have are replaced
before weights are loaded, so that they take no memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Module, ModuleList

from pdctl.engine.model.parallel import Group
from pdctl.engine.model.parallel.plan import CannotSplit


def layers_of_stage(count: int, stage: int, stages: int) -> range:
    """The layers of a stage, of `count`: as equal numbers as possible."""
    return range(stage * count // stages, (stage + 1) * count // stages)


def cut_layers(module: Module, count: int, group: Group) -> None:
    """Keep this stage's layers of a model of `count` layers, whose weights are not loaded yet. Raises CannotSplit."""
    if count < group.stages:
        raise CannotSplit(f"its {count} layers cannot be shared by {group.stages} stages")
    layers = _layers(module, count)
    own = layers_of_stage(count, group.stage, group.stages)
    layers[own.start].register_forward_pre_hook(lambda _, given: _taken(group, given))
    layers[own.stop - 1].register_forward_hook(lambda *call: _pass_on(group, call[2]))
    for index in range(count):
        if index not in own:
            comes_back = group.stage == 0 and index == count - 1
            layers[index] = _Elsewhere(layers[index], group if comes_back else None)
    if group.stage:
        _without_ends(module)


def _layers(module: Module, count: int) -> ModuleList:
    found = [part for part in module.modules() if isinstance(part, ModuleList) and len(part) == count]
    if not found:
        raise CannotSplit(f"{type(module).__name__} has no list of {count} layers")
    # Lists inside layers, such as experts, come behind the one that has them.
    return found[0]


def _without_ends(module: Module) -> None:
    """Only the first stage embeds tokens, and projects to the vocabulary."""
    embedding: Module = module.get_input_embeddings()  # type: ignore[operator]
    weight = embedding.weight
    assert isinstance(weight, torch.Tensor)
    module.set_input_embeddings(_Blank(weight.shape[1], weight.dtype))  # type: ignore[operator]
    module.set_output_embeddings(_NoVocabulary())  # type: ignore[operator]


def _taken(group: Group, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    """The arguments of a stage's first layer. The first stage's come from the embeddings."""
    return (group.take(given[0]), *given[1:]) if group.stage else None


def _pass_on(group: Group, found: object) -> None:
    if not isinstance(found, torch.Tensor):
        raise TypeError("its layers return more than hidden states")
    if group.stage < group.stages - 1 or group.gives_back:
        group.pass_on(found)


class _Elsewhere(Module):
    """A layer of another stage. `group`: set in place of the last layer where its output comes back."""

    def __init__(self, layer: Module, group: Group | None) -> None:
        super().__init__()
        # Models read attributes of their layers, such as the kind of attention. No submodule: it takes no weights.
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "_group", group)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        """Hidden states as they came, or as the last stage gives them back."""
        group: Group | None = object.__getattribute__(self, "_group")
        return group.take(hidden) if group is not None and group.gives_back else hidden


class _Blank(Module):
    """Embeddings of a stage that takes hidden states: only their shape matters."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._size, self._dtype = size, dtype
        # Models ask on which device it is.
        self.register_buffer("weight", torch.empty(0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [..., T]; returns NaN [..., T, size]: what depends on it is seen at the check at load."""
        return torch.full((*ids.shape, self._size), torch.nan, dtype=self._dtype, device=ids.device)


class _NoVocabulary(Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Something in the shape of logits [..., 1]; nobody reads it."""
        return hidden[..., :1]
