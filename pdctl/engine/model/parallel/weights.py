"""Load a model of which each rank has a part: only that part of each weight is kept in memory.

Weights come from safetensors files. Where transformers renames or converts those of a checkpoint, its own rules are
used; a converted weight is read as a whole and cut afterwards.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import safe_open
from torch.nn import Module, Parameter

from pdctl.engine.model.parallel import Group
from pdctl.engine.model.parallel.plan import CannotSplit, Cut, Cuts, Heads, split
from pdctl.engine.model.parallel.stages import cut_layers
from pdctl.host.models import weight_files


class _File(Protocol):
    """An open safetensors file."""

    def keys(self) -> list[str]:
        """Names of its weights."""
        ...

    def get_slice(self, name: str) -> torch.Tensor:
        """Something that reads what it is indexed with."""
        ...

    def get_tensor(self, name: str) -> torch.Tensor:
        """The whole weight."""
        ...


class _Converter(Protocol):
    """transformers' WeightConverter."""

    source_patterns: list[str]

    def add_tensor(self, target: str, source: str, pattern: str, tensor: torch.Tensor) -> None:
        """One of the weights it is made of."""
        ...

    def convert(self, name: str, model: Module, config: object) -> dict[str, list[torch.Tensor] | torch.Tensor]:
        """The weights that come out."""
        ...


def load_part(path: Path, config: object, dtype: torch.dtype, group: Group) -> Module:
    """This rank's part of a model. Raises CannotSplit, and what transformers raises for files it cannot use."""
    from transformers import AutoModelForCausalLM

    if getattr(config, "quantization_config", None):
        raise CannotSplit("its weights are quantized")
    with _parameters_on_meta():
        module: Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    text = config.get_text_config()  # type: ignore[attr-defined]
    query = int(text.num_attention_heads)
    heads = Heads(query, int(getattr(text, "num_key_value_heads", None) or query))
    table = dict(getattr(module, "tp_plan", None) or {})
    cuts = split(module, table, heads, group) if group.size > 1 else {}
    if group.stages > 1:
        cut_layers(module, int(text.num_hidden_layers), group)
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, "pt")) for file in weight_files(path)]
        _fill(module, cast(list[_File], opened), cuts, group)
    if not group.stage:
        # Other stages have no embeddings.
        module.tie_weights()  # type: ignore[operator]
    missing = [name for name, weight in module.named_parameters() if weight.is_meta]
    if missing:
        raise CannotSplit(f"its files lack {len(missing)} weights, such as {missing[0]}")
    return module


def _fill(module: Module, files: list[_File], cuts: Cuts, group: Group) -> None:
    _keep_in_float32(module)
    wanted = dict(module.state_dict(keep_vars=True))
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a dict
    rules = _Rules(module, set(wanted))
    converted: dict[str, _Converter] = {}
    for source in sorted(where, key=_natural):
        target, pattern = rules.target(source)
        if target not in wanted:
            continue
        if pattern is None:
            _set(module, target, _part(where[source], source, cuts, target, group), wanted[target])
            continue
        if any(_owner(name) != _owner(target) for name in converted):
            # Those of one module follow each other: what came before is complete.
            _set_converted(module, converted, wanted, cuts, group)
        converter = converted.setdefault(target, rules.converter(pattern))
        converter.add_tensor(target, source, pattern, where[source].get_tensor(source))
    _set_converted(module, converted, wanted, cuts, group)


def _keep_in_float32(module: Module) -> None:
    """Weights that a model computes with in float32 also in half precision, as transformers does when it loads them."""
    words = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    if next(module.parameters()).dtype is torch.float16:
        words |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    if not words:
        return
    kept = re.compile(r"(^|\.)(" + "|".join(map(re.escape, sorted(words))) + r")($|\.)")
    for name, weight in module.state_dict(keep_vars=True).items():
        if kept.search(name) and weight.is_floating_point():
            _set(module, name, weight.detach().float(), weight.detach().float())


class _Rules:
    """transformers' rules from the names in a checkpoint to those of the model's weights."""

    def __init__(self, module: Module, wanted: set[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        found = get_model_conversion_mapping(module)
        self._renamings = [rule for rule in found if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in found if isinstance(rule, WeightConverter)]
        self._by_pattern = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        self._wanted = {name: name for name in wanted}
        self._prefix = str(getattr(module, "base_model_prefix", ""))

    def target(self, source: str) -> tuple[str, str | None]:
        """The weight's name in the model, and the pattern of its converter, if it has one."""
        from transformers.core_model_loading import rename_source_key

        if source in self._wanted:
            return source, None
        found, pattern = rename_source_key(source, self._renamings, self._converters, self._prefix, self._wanted)
        return str(found), None if pattern is None else str(pattern)

    def converter(self, pattern: str) -> _Converter:
        """A new converter."""
        return cast(_Converter, copy.deepcopy(self._by_pattern[pattern]))


def _part(file: _File, source: str, cuts: Cuts, target: str, group: Group) -> torch.Tensor:
    """This rank's part of a weight, read without the rest."""
    if target not in cuts:
        return file.get_tensor(source)
    cut = cuts[target]
    if cut is None:
        whole = file.get_tensor(source)
        return whole if group.rank == 0 else torch.zeros_like(whole)
    stored = file.get_slice(source)
    before = (slice(None),) * cut.dim
    parts = [stored[(*before, slice(part.start, part.stop))] for part in cut.ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, cut.dim)


def _set_converted(
    module: Module, converted: dict[str, _Converter], wanted: dict[str, torch.Tensor], cuts: Cuts, group: Group
) -> None:
    """Cut what the converters give, and forget them."""
    for target, converter in converted.items():
        for name, found in converter.convert(target, model=module, config=module.config).items():
            whole = found[0] if isinstance(found, list) else found
            cut = cuts.get(name, Cut(0, (range(whole.shape[0]),)))
            part = (whole if group.rank == 0 else torch.zeros_like(whole)) if cut is None else cut.of(whole)
            _set(module, name, part, wanted[name])
    converted.clear()


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _set(module: Module, name: str, value: torch.Tensor, old: torch.Tensor) -> None:
    own = name.rpartition(".")[2]
    part = module.get_submodule(_owner(name))
    value = value.to(old.dtype)
    if own in part._parameters:
        part._parameters[own] = Parameter(value, requires_grad=False)
    else:
        part._buffers[own] = value


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers in names in their order: experts are merged in the order in which they come."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in name.split(".")]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """New parameters take no memory. Buffers do: models compute them when they are built."""
    register = Module.register_parameter

    def on_meta(self: Module, name: str, param: Parameter | None) -> None:
        register(self, name, param)
        if param is not None and not param.is_meta:  # one that is shared stays shared
            made = Parameter(param.to("meta"), requires_grad=False)
            made.__dict__.update(param.__dict__)
            self._parameters[name] = made

    Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        Module.register_parameter = register  # type: ignore[method-assign]
