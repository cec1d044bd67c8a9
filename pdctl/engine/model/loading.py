"""Load a Hugging Face model for paged attention, and refuse one that would compute wrong results.

The check: every layer must have called the attention hook exactly once with the same shape of call, and the paged
logits of 32 tokens must agree with the model's own dense ones. Positions at which they would not are not served.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from pdctl.engine.cache.shards import heads
from pdctl.engine.model.attention import hook, masks
from pdctl.engine.model.attention.batch import LayerNeed
from pdctl.engine.model.attention.hook import HookCall
from pdctl.engine.model.linear import Watch, speed_up
from pdctl.engine.model.native.fuse import fuse
from pdctl.engine.model.native.rows import kernels
from pdctl.engine.model.parallel import Group
from pdctl.engine.model.parallel.plan import CannotSplit
from pdctl.engine.model.parallel.stages import layers_of_stage
from pdctl.engine.model.parallel.weights import load_part
from pdctl.host.memory import read_group_room, read_memory
from pdctl.host.models import fingerprint
from pdctl.wire import LayerShape, Part

_CHECK_TOKENS = 32
# Relative to the largest logit. fp32 sums in another order differ by about 1e-6; a wrong mask by 1e-1 and more.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
# In half precision, deep models differ more than that between two correct orders of summing (0.07 with 8B random
# weights on an H200). So the difference between the model's own two dense attentions is measured; this multiple of it
# is allowed.
_NOISE_FACTOR = 3.0
_MOST_NOISE = 0.25
# Kinds of rotary embedding whose frequencies change when a sequence gets longer than at training.
_ROPES_BY_LENGTH = ("dynamic", "longrope")
# Rules for masks are compared up to here.
_MOST_POSITIONS = 2**20
# Memory that stays free for other processes when a weight is kept twice.
_SPARE_BYTES = 2 << 30


class ModelRefused(Exception):
    """The model cannot be served; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with all layers using the attention hook. `shapes` of the whole KV of its layers in their order, of which
    this rank has a `part`; of several stages, each has the shapes of its own layers. `needs`: what its layers ask of
    attention; `fingerprint` identifies the weights; `max_positions`: the longest sequence that is computed as the model
    says."""

    module: torch.nn.Module
    shapes: list[LayerShape]
    needs: frozenset[LayerNeed]
    eos_token_ids: frozenset[int]
    vocab_size: int
    max_positions: int
    fingerprint: str
    dtype: str
    part: Part


def load_model(
    path: str,
    device: torch.device,
    dtype: torch.dtype,
    table: Path | None = None,
    reserved: int = 0,
    group: Group | None = None,
) -> LoadedModel:
    """Load weights from a local directory onto `device`; with a `group`, only this rank's part of them. `table`,
    `reserved`: see hook_model. Raises ModelRefused, RankLost."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        if getattr(config, "is_encoder_decoder", False):
            raise ModelRefused(f"{path} is an encoder-decoder model; only decoder-only models can be served")
        if group is not None:
            # Only on a GPU is what the files have read for sure: on the host their pages may wait for their use.
            module = load_part(Path(path), config, dtype, group).to(device)
            group.meet()
        else:
            module = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, local_files_only=True)
    except CannotSplit as failure:
        raise ModelRefused(f"{path} cannot be shared by several ranks: {failure}") from failure
    except (OSError, ValueError, KeyError, ImportError) as failure:
        raise ModelRefused(f"transformers cannot load {path}: {failure}") from failure
    ids = _eos_token_ids(Path(path), config)
    return hook_model(module.to(device), path, ids, fingerprint(Path(path)), table, reserved, group)


def hook_model(
    module: torch.nn.Module,
    name: str,
    eos_token_ids: frozenset[int],
    digest: str,
    table: Path | None = None,
    reserved: int = 0,
    group: Group | None = None,
) -> LoadedModel:
    """Make a transformers model use the attention hook, and on a CPU our products and kernels. Raises ModelRefused.

    `name` is for messages. `table`: folder of the host's table of products; None: fixed rules. `reserved`: bytes of
    memory that the caller still needs. `group`: the ranks that have the other parts of the model.
    """
    hook.register()
    masks.register()
    module = module.eval().requires_grad_(False)
    with Watch(module) as watch:
        calls = _hook_calls(module, module.config, name, group)
    text_config = module.config.get_text_config()  # type: ignore[union-attr, operator]
    positions = _positions(calls, text_config, name)
    speed_up(module, watch, table, _room() - reserved)
    if group is not None:
        # One rank may have measured or compiled what the others then had. `fuse` runs parts of the model.
        kernels(next(module.parameters()).dtype)
        group.meet()
    fuse(module)
    shapes = [LayerShape(call.need.kv_heads, call.need.key_dim, call.need.value_dim) for call in calls]
    whole, part = _whole(shapes, text_config, group, name)
    return LoadedModel(
        module=module,
        shapes=whole,
        needs=frozenset(call.need for call in calls),
        eos_token_ids=eos_token_ids,
        vocab_size=int(text_config.vocab_size),
        max_positions=positions,
        fingerprint=digest,
        dtype=str(next(module.parameters()).dtype).removeprefix("torch."),
        part=part,
    )


def _whole(shapes: list[LayerShape], config: object, group: Group | None, path: str) -> tuple[list[LayerShape], Part]:
    """The shapes of the whole KV of these layers, and which part of the model's has the shapes of this rank."""
    if group is None:
        return shapes, Part()
    own = layers_of_stage(int(config.num_hidden_layers), group.stage, group.stages)  # type: ignore[attr-defined]
    place = (own.start, len(own)) if group.stages > 1 else (0, 0)
    if group.size == 1:
        return shapes, Part(0, 1, *place)
    query: int = config.num_attention_heads  # type: ignore[attr-defined]
    kv_heads = int(getattr(config, "num_key_value_heads", None) or query)
    whole = [msgspec.structs.replace(shape, kv_heads=kv_heads) for shape in shapes]
    for part in (Part(group.rank, group.size, *place), Part(0, 1, *place)):
        if [len(heads(shape.kv_heads, part)) for shape in whole] == [shape.kv_heads for shape in shapes]:
            return whole, part
    raise ModelRefused(f"tensor_parallel cannot serve {path}: its layers have different numbers of KV heads")


def _room() -> int:
    """Bytes of memory that may be used for speed."""
    _, available = read_memory()
    room = read_group_room()
    return (available if room is None else min(room, available)) - _SPARE_BYTES


def _hook_calls(module: torch.nn.Module, config: object, path: str, group: Group | None) -> list[HookCall]:
    """Switch to the hook, run three tokens, and record the call of each layer that this rank has."""
    count = int(copy.copy(config).get_text_config().num_hidden_layers)  # type: ignore[attr-defined]
    layers = layers_of_stage(count, group.stage, group.stages) if group is not None else range(count)
    log = hook.HookLog()
    family = type(module).__name__
    try:
        module.set_attn_implementation(masks.NAME)  # type: ignore[operator]
        hook.set_context(log)
        forward(module, torch.tensor([1, 2, 3]), torch.arange(3), torch.tensor([2]))
        module.set_attn_implementation(hook.NAME)  # type: ignore[operator]
    except (ValueError, TypeError, NotImplementedError, RuntimeError, IndexError, AttributeError) as failure:
        raise ModelRefused(f"{family} ({path}) does not run through the attention hook: {failure}") from failure
    finally:
        hook.set_context(None)
    called = sorted(call.layer for call in log.calls)
    if called != list(layers):
        raise ModelRefused(
            f"{family} ({path}) cannot be served: {len(set(called))} of its {len(layers)} layers call the attention "
            f"hook ({len(called)} calls). Models whose attention does not go through transformers' AttentionInterface, "
            "or with linear-attention layers, are not supported"
        )
    return sorted(log.calls, key=lambda call: call.layer)


def _positions(calls: list[HookCall], config: object, path: str) -> int:
    """The number of positions that are computed as the model says: it ends where a layer sees other tokens than the
    hook lets it, and where the rotation of all tokens would depend on the longest sequence of a batch."""
    found = int(getattr(config, "max_position_embeddings", 0) or 2**31)
    ropes: dict[str, object] = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *ropes.values()):  # of the model, or of each type of layer
        if isinstance(rope, dict) and rope.get("rope_type") in _ROPES_BY_LENGTH:
            found = min(found, int(rope.get("original_max_position_embeddings") or found))
    try:
        seen = masks.horizon(calls, min(found, _MOST_POSITIONS))
    except (IndexError, RuntimeError, TypeError) as failure:
        raise ModelRefused(f"{path}: the model's attention masks cannot be checked: {failure}") from failure
    return seen if seen < min(found, _MOST_POSITIONS) else found


def forward(module: torch.nn.Module, ids: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Run packed ids and positions [T]; returns logits [len(keep), vocab] of the rows `keep`."""
    device = next(module.parameters()).device
    with torch.inference_mode():
        result = module(
            input_ids=ids[None].to(device),
            position_ids=positions[None].to(device),
            use_cache=False,
            logits_to_keep=keep.to(device),
        )
    logits: torch.Tensor = result.logits[0]
    return logits


def dense_logits(loaded: LoadedModel, ids: torch.Tensor, implementation: str = "eager") -> torch.Tensor:
    """Logits [T, vocab] by the model's own dense attention. Raises ValueError for an unknown implementation."""
    module = loaded.module
    try:
        module.set_attn_implementation(implementation)  # type: ignore[operator]
        return forward(module, ids, torch.arange(len(ids)), torch.arange(len(ids)))
    finally:
        module.set_attn_implementation(hook.NAME)  # type: ignore[operator]


def rounding_noise(dense: torch.Tensor, other_way: Callable[[], torch.Tensor]) -> float:
    """The difference of two correct dense attentions of a model, relative to the largest logit; `other_way` computes
    the second one. 0 in fp32, where they agree, and for a model with only one."""
    if dense.dtype is torch.float32:
        return 0.0
    try:
        other = other_way()
    except (ValueError, ImportError):
        return 0.0
    found = float((other - dense).abs().max()) / max(float(dense.abs().max()), 1e-6)
    return found if found == found else 0.0  # NaN is no evidence


def check_agreement(paged: torch.Tensor, dense: torch.Tensor, family: str, noise: float = 0.0) -> None:
    """Raise ModelRefused unless both are finite and close. `noise`: see rounding_noise."""
    scale = float(dense.abs().max())
    worst = float((paged - dense).abs().max())
    allowed = max(_TOLERANCE[dense.dtype], min(_NOISE_FACTOR * noise, _MOST_NOISE)) * max(scale, 1e-6)
    if not worst <= allowed:
        raise ModelRefused(
            f"{family} cannot be served: paged and dense logits differ by {worst:.3g} where {allowed:.3g} is allowed"
        )


def check_token_ids(vocab_size: int) -> torch.Tensor:
    """The tokens of the check at load: spread over the vocabulary, always the same."""
    return torch.tensor([(index * 7919 + 11) % vocab_size for index in range(_CHECK_TOKENS)])


def _eos_token_ids(path: Path, config: object) -> frozenset[int]:
    value: object = getattr(config, "eos_token_id", None)
    generation = path / "generation_config.json"
    if generation.is_file():
        value = json.loads(generation.read_text()).get("eos_token_id", value)
    if isinstance(value, int):
        return frozenset({value})
    return frozenset(int(token) for token in value) if isinstance(value, list | tuple) else frozenset()
