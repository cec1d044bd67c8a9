"""Data about the engines for admission."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pdctl.proxy.engines.engine import Engine

# Tokens of a step of an engine that does not tell its budget, and steps that its prompts may fill: one that it computes
# and one that waits. More would only wait there, where the order is not that of the proxy.
_BUDGET, _STEPS = 2048, 2


class Room(NamedTuple):
    """What the usable engines have, None for unknown: `seats` of those that decode, `kv_tokens` free at the emptiest of
    these, and the tokens of `prompts` that keep those busy that compute prompts, each with two of them."""

    seats: int | None = None
    kv_tokens: int | None = None
    prompts: float = 0.0
    prefills: int = 0


@dataclass(frozen=True, slots=True)
class Outlook:
    """The current state of the pool. `seats`: None if unknown. `ttft_s`: predicted for this request, 0 if unknown.

    `kv_room`: whether the request's KV fits on some engine. `tokens`: predicted tokens of its prompt. `prompts`: tokens
    of prompts that keep the engines busy, and `prefills` the number of engines that compute them; 0 for any.
    """

    seats: int | None
    ttft_s: float
    kv_room: bool = True
    tokens: float = 0.0
    prompts: float = 0.0
    prefills: int = 0


def room_of(engines: Sequence[Engine], now: float, taken_by_others: Callable[[Engine], float]) -> Room:
    """The room of a pool. `taken_by_others`: streams of other workers at an engine."""
    usable = [engine for engine in engines if engine.usable(now)]
    decodes = [engine for engine in usable if engine.address.role != "prefill"] or usable
    prefills = [engine for engine in usable if engine.address.role != "decode"] or usable
    seats = [engine.condition.seats for engine in decodes]
    known = sum(seat or 0 for seat in seats) if seats and all(seats) else None
    if known is not None and (taken := int(sum(map(taken_by_others, decodes)))):
        known = max(1, known - taken)
    rooms = [engine.condition.kv_tokens_free for engine in decodes]
    kv_tokens = None if None in rooms else max((room or 0 for room in rooms), default=None)
    budgets = (engine.condition.work.budget if engine.condition.work else _BUDGET for engine in prefills)
    return Room(known, kv_tokens, float(_STEPS * sum(budgets)), len(prefills))
