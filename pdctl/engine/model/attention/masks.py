"""Which tokens each layer of a model may attend to, asked of the model itself.

The hook knows causal order and a window. transformers makes masks by rules over positions, which for some layers say
something else: in Llama 4, tokens see only those of their own chunk of 8,192. The check of logits at load is too short
to notice; so the rules are compared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pdctl.engine.model.attention.hook import HookCall, attend

# The name under which a model is asked. Under the hook's own name transformers makes no masks.
NAME = "pdctl-check"
# Tokens after the newest one, which a causal rule must not show.
_AHEAD = 8

# (batch, head, query position, key position) -> whether it is visible; index tensors that broadcast.
Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class _RuledMask(torch.Tensor):
    """A mask that remembers the rule it was made by."""

    rule: Rule


def register() -> None:
    """Register `attn_implementation="pdctl-check"`: the hook, with masks."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _mask)


def horizon(calls: list[HookCall], positions: int) -> int:
    """The number of positions, at most `positions`, for which each layer's rule is the hook's. Layers without a mask
    say nothing. Raises IndexError, RuntimeError or TypeError for a rule that is not one over positions."""
    rules = {}
    for call in calls:
        if isinstance(call.mask, _RuledMask):
            rules[id(call.mask.rule), call.need.window] = call.mask.rule
    return min((_horizon(rule, window, positions) for (_, window), rule in rules.items()), default=positions)


def _mask(
    batch_size: int, q_length: int, kv_length: int, mask_function: Rule, device: torch.device | None = None, **_: object
) -> torch.Tensor:
    found = torch.zeros(batch_size, 1, q_length, kv_length, device=device).as_subclass(_RuledMask)
    found.rule = mask_function
    return found


def _horizon(rule: Rule, window: int | None, positions: int) -> int:
    """The first position for which the rules differ. A rule that differs for one differs for all later ones."""
    good, bad = -1, positions
    at = 0
    while at < positions and not _differs(rule, window, at):
        good, at = at, min(2 * at + 1, positions - 1) if at < positions - 1 else positions
    bad = at
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if _differs(rule, window, middle) else (middle, bad)
    return bad


def _differs(rule: Rule, window: int | None, at: int) -> bool:
    keys = torch.arange(at + _AHEAD)
    zero = torch.zeros(1, dtype=torch.long)
    visible = rule(zero, zero, torch.tensor([at]), keys).expand(len(keys))
    wanted = keys <= at if window is None else (keys <= at) & (keys > at - window)
    return not torch.equal(visible, wanted)
