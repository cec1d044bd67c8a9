"""Which roles engines should have, decided from their load. Pure: the same code runs in the supervisor and in the
simulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from pdctl.latency import Work

RoleName = Literal["prefill", "decode", "hybrid"]


@dataclass(frozen=True, slots=True)
class Rules:
    """`ttft_s`, `tpot_s`: the targets. `min_prefill`, `min_decode`: engines that keep such a role at least; a hybrid
    counts as both. `cooldown_s`: how long an engine keeps its role after a change."""

    ttft_s: float
    tpot_s: float
    min_prefill: int = 1
    min_decode: int = 1
    cooldown_s: float = 30.0


@dataclass(frozen=True, slots=True)
class EngineView:
    """One engine, now. `seats`: sequences that it runs at once; `kv_used`: the part of its KV blocks in use;
    `is_settled`: it can change its role, and has ended its work of an earlier one; `inline`: it computes prompts as a
    decode engine, too."""

    name: str
    role: RoleName
    work: Work
    seats: int
    kv_used: float = 0.0
    is_settled: bool = True
    inline: bool = False


class Pressure(NamedTuple):
    """How near a service is to its targets; 1.0 is at them. `prefill`: predicted wait of a new prompt / TTFT target;
    `decode`: predicted step / TPOT target, or the use of seats or KV / their limit, whichever is higher."""

    prefill: float
    decode: float


class Decision(NamedTuple):
    """`engine` should get `role`; "" if none should. `why`: in words; `now` and `then`: the pressures, and those after
    the change, as predicted. `freezes`: no more changes for a while, because the last ones undid each other."""

    engine: str
    role: RoleName
    why: str
    now: Pressure
    then: Pressure
    freezes: bool = False
