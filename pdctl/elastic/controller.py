"""The controller: at most one change of a role per look, and none on noise.

An engine changes only if one side misses its target for several looks, and the other side is predicted to keep its own
afterwards. It gets the role after which the worse side is best off: the other role, or `hybrid`, which adds to one side
without taking an engine from the other. Where both miss theirs, no change helps: admission sheds. Between the
thresholds nothing happens, an engine that has changed rests, and changes that undo each other freeze the roles. The
thresholds are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from pdctl.elastic import Decision, EngineView, Pressure, RoleName, Rules
from pdctl.latency import Step

# Pressure of the side that needs help, of the one that can give up an engine, and of that one after any change.
_NEEDS, _GIVES, _GIVES_AFTER = 1.0, 0.6, 0.9
# What a change must leave of the pressure that it is made for.
_HELPS = 0.9
# The part of its time that an engine has for prompts at least, however many answers it decodes.
_LEAST_SHARE = 0.1
# Looks in a row that must agree.
_LOOKS = 3
# Changes back within this time, seconds; that many freeze the roles for as long.
_FLAPS, _FLAP_S = 3, 600.0
# Parts of their KV and of their seats at which decode engines are full: then requests wait at the door.
_KV_FULL, _SEATS_FULL = 0.9, 0.95


@dataclass(frozen=True, slots=True)
class Change:
    """A change that was made."""

    at: float
    engine: str
    before: RoleName
    role: RoleName


@dataclass(frozen=True, slots=True)
class Memory:
    """What the controller remembers. `needy`: the side that needed help at the last looks, and how many; `changes`: the
    newest last; `frozen_until`: seconds on the caller's clock."""

    needy: tuple[str, int] = ("", 0)
    changes: tuple[Change, ...] = field(default=())
    frozen_until: float = 0.0

    def audit(self) -> None:
        """Raises AssertionError if the memory is inconsistent."""
        assert self.needy[1] >= 0
        assert all(before.at <= after.at for before, after in zip(self.changes, self.changes[1:], strict=False))


def decide(memory: Memory, engines: Sequence[EngineView], rules: Rules, now: float) -> tuple[Memory, Decision]:
    """Look at the engines. Returns what to remember, and the decision. A change counts as made."""
    pressure = pressure_of(engines, rules)
    needy = _needy(pressure)
    looks = memory.needy[1] + 1 if needy and needy == memory.needy[0] else int(bool(needy))
    memory = replace(memory, needy=(needy, looks))

    def keep(why: str) -> tuple[Memory, Decision]:
        return memory, Decision("", "hybrid", why, pressure, pressure)

    if not needy:
        return keep(_balance(pressure))
    if now < memory.frozen_until:
        return keep(f"frozen for {memory.frozen_until - now:.0f} s: the last changes undid each other")
    if looks < _LOOKS:
        return keep(f"{needy} needs help, at {looks} of {_LOOKS} looks")
    if not all(engine.is_settled for engine in engines):
        return keep("a change is in progress")
    found = _best(memory, engines, rules, needy, now)
    if isinstance(found, str):
        return keep(found)
    engine, role, after = found
    change = Change(now, engine.name, engine.role, role)
    freezes = _flaps((*memory.changes, change), now) >= _FLAPS
    if freezes:
        memory = replace(memory, frozen_until=now + _FLAP_S, changes=())
        why = f"{_FLAPS} changes back within {_FLAP_S / 60:.0f} minutes: no more changes for as long"
        return memory, Decision("", "hybrid", why, pressure, pressure, freezes=True)
    kept = (*(one for one in memory.changes if now - one.at < _FLAP_S), change)
    why = f"{needy} misses its target, and {'decode' if needy == 'prefill' else 'prefill'} keeps its own then"
    return replace(memory, changes=kept, needy=("", 0)), Decision(engine.name, role, why, pressure, after)


def pressure_of(engines: Sequence[EngineView], rules: Rules) -> Pressure:
    """The pressures if all work were divided evenly, as the router divides it. An engine that decodes has for prompts
    what its steps leave of the TPOT target."""
    decodes = [engine for engine in engines if engine.role != "prefill"]
    step_s = _step_s(engines, decodes)
    left = max(_LEAST_SHARE, 1 - step_s / rules.tpot_s)
    shares = sum(1.0 if one.role == "prefill" else left for one in engines if one.role != "decode" or one.inline)
    waits = sum(_prompt_s(engine) for engine in engines)
    prefill = waits / shares / rules.ttft_s if shares else (1e9 if waits else 0.0)
    if not decodes:
        return Pressure(prefill, 1e9 if any(engine.work.decodes for engine in engines) else 0.0)
    kv = sum(engine.kv_used for engine in decodes) / len(decodes) / _KV_FULL
    seats = sum(engine.work.decodes for engine in engines) / sum(engine.seats for engine in decodes) / _SEATS_FULL
    return Pressure(prefill, max(step_s / rules.tpot_s, kv, seats))


def _step_s(engines: Sequence[EngineView], decodes: Sequence[EngineView]) -> float:
    """Seconds of the slowest step, with the answers of all engines divided over those that decode."""
    answers = sum(engine.work.decodes for engine in engines)
    if not decodes or not answers:
        return 0.0
    count, context = answers / len(decodes), sum(engine.work.context for engine in engines) / len(decodes)
    step = Step(count, 0.0, count, context, count)
    return max(engine.work.times.seconds(step) for engine in decodes)


def _needy(pressure: Pressure) -> str:
    """The side that needs help and can get it."""
    if pressure.prefill > _NEEDS and pressure.decode <= _GIVES_AFTER:
        return "prefill"
    return "decode" if pressure.decode > _NEEDS and pressure.prefill <= _GIVES_AFTER else ""


def _balance(pressure: Pressure) -> str:
    if pressure.prefill > _NEEDS and pressure.decode > _GIVES_AFTER:
        return "both sides are loaded: no role helps" if pressure.decode > _NEEDS else "decode has no room to give"
    if pressure.decode > _NEEDS:
        return "prefill has no room to give"
    return "the targets are kept"


def _best(
    memory: Memory, engines: Sequence[EngineView], rules: Rules, needy: str, now: float
) -> tuple[EngineView, RoleName, Pressure] | str:
    """The engine, its new role, and the pressure then: the change after which the worse side is best off, of the engine
    with the least work of its own; or why there is none."""
    changed = {change.engine: change.at for change in memory.changes}
    able = [one for one in engines if one.role != needy and now - changed.get(one.name, -1e9) >= rules.cooldown_s]
    if not able:
        return f"the engines that could help changed less than {rules.cooldown_s:g} s ago"
    is_prefill = needy == "prefill"
    before = pressure_of(engines, rules)
    found: list[tuple[float, bool, float, str, EngineView, RoleName, Pressure]] = []
    refusals: list[str] = []
    for engine in able:
        for role in _roles(engine, engines, rules, needy, before):
            then = pressure_of([replace(one, role=role) if one is engine else one for one in engines], rules)
            given, got = (then.decode, then.prefill) if is_prefill else (then.prefill, then.decode)
            if given > _GIVES_AFTER:
                refusals.append(f"{'decode' if is_prefill else 'prefill'} would be at {given:.2f} of its target then")
            elif got > _HELPS * (before.prefill if is_prefill else before.decode):
                refusals.append(f"{needy} would still be at {got:.2f} of its target")
            else:
                own = _own_work(engine, is_prefill)
                found.append((max(then), role == "hybrid", own, engine.name, engine, role, then))
    if not found:
        return refusals[0] if refusals else _least(rules, is_prefill)
    *_, chosen, role, then = min(found, key=lambda one: one[:4])
    return chosen, role, then


def _roles(
    engine: EngineView, engines: Sequence[EngineView], rules: Rules, needy: str, now: Pressure
) -> Iterator[RoleName]:
    """The roles that an engine could get for the side that needs help."""
    if engine.role != "hybrid":
        yield "hybrid"
    giving, least = ("decode", rules.min_decode) if needy == "prefill" else ("prefill", rules.min_prefill)
    if sum(one.role in (giving, "hybrid") for one in engines) > least:
        room = now.decode if needy == "prefill" else now.prefill
        if room < _GIVES:
            yield "prefill" if needy == "prefill" else "decode"


def _least(rules: Rules, is_prefill: bool) -> str:
    side, least = ("decode", rules.min_decode) if is_prefill else ("prefill", rules.min_prefill)
    return f"{side} keeps at least {least} of its engines"


def _own_work(engine: EngineView, is_prefill: bool) -> float:
    return float(engine.work.decodes) if is_prefill else _prompt_s(engine)


def _prompt_s(engine: EngineView) -> float:
    """Seconds for the prompts that wait in an engine, or are computed."""
    work = engine.work
    return work.times.prompt_s(work.prompt_tokens, 0, work.budget) if work.prompt_tokens else 0.0


def _flaps(changes: Sequence[Change], now: float) -> int:
    """Changes that took back an earlier one of the same engine."""
    recent = [change for change in changes if now - change.at < _FLAP_S]
    return sum(
        any(earlier.engine == later.engine and earlier.before == later.role for earlier in recent[:at])
        for at, later in enumerate(recent)
    )
