"""Which part of each weight a rank has, by the model's own table of styles, and what its layers then exchange.

transformers' models name a style for modules and parameters (`base_model_tp_plan`, `_tp_plan`). A style that is not
known here, or a size that the ranks cannot share, refuses the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import Embedding, Linear, Module

from pdctl.engine.model.parallel import Group

# Styles that change nothing in a forward pass: every rank has the whole weight.
_WHOLE = ("replicated_with_grad_allreduce", "replicate", "mla_kv_a_proj")
_COLUMNS = ("colwise", "colwise_gather_output", "colwise_rep")
_JOINED = ("colwise_gather_output", "colwise_rep", "embedding_colwise")
_ROWS = ("rowwise", "rowwise_split_input", "rowwise_rep")
_SPLIT_INPUT = ("rowwise_split_input", "rowwise_rep")
_PACKED = {"packed_colwise": -2, "packed_rowwise": -1}
# Modules whose outputs, over all ranks, are added.
_ADDED = ("moe_tp_experts", "all_reduce")
# Projections to key and value heads, which may be fewer than ranks.
_KV = ("k_proj", "v_proj")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


class CannotSplit(Exception):
    """The model cannot be computed by so many ranks; the message gives the reason."""


class Cut(NamedTuple):
    """A part of a weight: these ranges of dimension `dim`, one after the other."""

    dim: int
    ranges: tuple[range, ...]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """That part of a whole weight."""
        parts = [tensor.narrow(self.dim, part.start, len(part)) for part in self.ranges]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)).contiguous()


# By the name of a parameter. `None`: only the first rank has it, others have zeros, because the parts are added.
Cuts = dict[str, Cut | None]


class Heads(NamedTuple):
    """Attention heads of the whole model."""

    query: int
    kv: int


def split(module: Module, table: dict[str, str], heads: Heads, group: Group) -> Cuts:
    """Prepare a model whose weights are not loaded yet: note sizes, exchange outputs. Returns the cuts of its weights.
    Raises CannotSplit."""
    if heads.query % group.size or (heads.kv % group.size and group.size % heads.kv):
        raise CannotSplit(
            f"its {heads.query} attention heads and {heads.kv} KV heads cannot be shared by {group.size} ranks"
        )
    table = _with_tied(module, table)
    cuts: Cuts = {}
    is_split = False
    for name, part in module.named_modules():
        style = table.get(_NUMBER.sub("*", name))
        if style is not None and style not in _WHOLE:
            is_split |= style in _COLUMNS and isinstance(part, Linear) and name.rsplit(".", 1)[-1] != "lm_head"
            _split_module(name, part, style, heads, group, cuts)
        for own, weight in part.named_parameters(recurse=False):
            style = table.get(_NUMBER.sub("*", f"{name}.{own}"))
            if style is not None and style not in _WHOLE:
                cuts[f"{name}.{own}"] = _parameter_cut(f"{name}.{own}", weight, style, group)
    if not is_split:
        raise CannotSplit(f"{type(module).__name__} has no plan that splits its layers")
    _group_heads(module, table, heads, group)
    return cuts


def _with_tied(module: Module, table: dict[str, str]) -> dict[str, str]:
    """Embeddings that are also the vocabulary projection are cut the same way, by rows."""
    names = {id(part.weight): name for name, part in module.named_modules() if isinstance(part, Embedding)}
    found = dict(table)
    for name, part in module.named_modules():
        if isinstance(part, Linear) and (embedding := names.get(id(part.weight))):
            found |= {name: "colwise_gather_output", embedding: "embedding_rowwise"}
    return found


def _split_module(name: str, part: Module, style: str, heads: Heads, group: Group, cuts: Cuts) -> None:
    if style in _ADDED:
        part.register_forward_hook(lambda *call: group.add(call[2]))
    elif isinstance(part, Embedding) and style == "embedding_rowwise":
        _split_vocabulary(name, part, group, cuts)
    elif isinstance(part, Linear) and style in _COLUMNS:
        _split_columns(name, part, style, heads, group, cuts)
    elif isinstance(part, Linear) and style in _ROWS:
        _split_rows(name, part, style, group, cuts)
    elif isinstance(part, Linear) and style == "packed_colwise":
        cuts[f"{name}.weight"] = _packed(name, part.weight, 0, group)
        part.out_features //= group.size
        if part.bias is not None:
            cuts[f"{name}.bias"] = _packed(name, part.bias, 0, group)
    else:
        raise CannotSplit(f"{name} is a {type(part).__name__} with the style {style!r}, which is not supported")


def _split_columns(name: str, part: Linear, style: str, heads: Heads, group: Group, cuts: Cuts) -> None:
    own, whole = name.rsplit(".", 1)[-1], part.out_features
    if own in _KV and heads.kv < group.size and style == "colwise":
        size, rest = divmod(whole, heads.kv)
        head = group.rank * heads.kv // group.size
        kept = range(head * size, (head + 1) * size) if not rest else range(0)
    elif style in _JOINED:
        kept = _nearly_equal(whole, group)
    else:
        kept = _equal(name, whole, group)
    cuts[f"{name}.weight"] = Cut(0, (kept,))
    if part.bias is not None:
        cuts[f"{name}.bias"] = Cut(0, (kept,))
    part.out_features = len(kept)
    if style in _JOINED:
        part.register_forward_hook(_joining(whole, group))


def _split_rows(name: str, part: Linear, style: str, group: Group, cuts: Cuts) -> None:
    kept = _equal(name, part.in_features, group)
    cuts[f"{name}.weight"] = Cut(1, (kept,))
    if part.bias is not None:
        cuts[f"{name}.bias"] = None
    part.in_features = len(kept)
    if style in _SPLIT_INPUT:
        part.register_forward_pre_hook(lambda _, given: (given[0][..., kept.start : kept.stop], *given[1:]))
    part.register_forward_hook(lambda *call: group.add(call[2]))


def _split_vocabulary(name: str, part: Embedding, group: Group, cuts: Cuts) -> None:
    """Each rank looks up the tokens that it has; the others are zeros, and all are added."""
    kept = _nearly_equal(part.num_embeddings, group)
    cuts[f"{name}.weight"] = Cut(0, (kept,))
    part.num_embeddings, part.padding_idx = len(kept), None
    others: list[torch.Tensor] = []

    def before(_: Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        ids = given[0] - kept.start
        others[:] = [(ids < 0) | (ids >= len(kept))]
        return (ids.clamp(0, len(kept) - 1), *given[1:])

    def after(_: Module, given: object, found: torch.Tensor) -> torch.Tensor:
        return group.add(found.masked_fill(others[0][..., None], 0))

    part.register_forward_pre_hook(before)
    part.register_forward_hook(after)


def _joining(whole: int, group: Group) -> Callable[[Module, object, torch.Tensor], torch.Tensor]:
    each = -(-whole // group.size)

    def join(_: Module, given: object, found: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(found, (0, each - found.shape[-1]))
        return group.join(padded)[..., :whole]

    return join


def _parameter_cut(name: str, weight: torch.Tensor, style: str, group: Group) -> Cut:
    """Of experts' weights [expert, out, in], which their module reads as parameters."""
    if weight.dim() == 3 and style in _PACKED:
        return _packed(name, weight, weight.dim() + _PACKED[style], group)
    if weight.dim() == 3 and style in ("colwise", "rowwise"):
        dim = 1 if style == "colwise" else 2
        return Cut(dim, (_equal(name, weight.shape[dim], group),))
    raise CannotSplit(f"the weight {name} has the style {style!r}, which is not supported")


def _packed(name: str, weight: torch.Tensor, dim: int, group: Group) -> Cut:
    """Two halves in one weight, each of which is shared."""
    half, rest = divmod(weight.shape[dim], 2)
    part = _equal(name, 0 if rest else half, group)
    return Cut(dim, (part, range(half + part.start, half + part.stop)))


def _equal(name: str, whole: int, group: Group) -> range:
    each, rest = divmod(whole, group.size)
    if rest or not each:
        raise CannotSplit(f"the size {whole} of {name} cannot be shared by {group.size} ranks")
    return range(group.rank * each, (group.rank + 1) * each)


def _nearly_equal(whole: int, group: Group) -> range:
    """The last ranks may have less."""
    each = -(-whole // group.size)
    return range(min(whole, group.rank * each), min(whole, (group.rank + 1) * each))


def _group_heads(module: Module, table: dict[str, str], heads: Heads, group: Group) -> None:
    """Where ranks share a KV head, a rank has fewer query heads for each. Dense attention asks how many."""
    if heads.kv >= group.size:
        return
    for name, part in module.named_modules():
        if hasattr(part, "num_key_value_groups") and table.get(_NUMBER.sub("*", f"{name}.k_proj")) == "colwise":
            part.num_key_value_groups = heads.query // group.size
