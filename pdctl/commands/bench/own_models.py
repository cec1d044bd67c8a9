"""The latency models that engines have of themselves: as a profile, a table and plots."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pdctl import console
from pdctl.errors import PdctlError

if TYPE_CHECKING:
    from pdctl.bench.profile import Profile
    from pdctl.bench.report.observations import Curves
    from pdctl.control_api import MeasuredStatus, StepLatency

_CONTEXT = 256


def own_profile(status: MeasuredStatus, longest: int, widest: int) -> Profile | None:
    """The profile from the models of the first engines of each role; None if an engine has no model."""
    from pdctl.bench.profile import of_engines

    by_role: dict[str, StepLatency] = {}
    for process in status.processes:
        if process.is_engine:
            if process.latency is None:
                return None
            by_role.setdefault(process.role, process.latency)
    if not by_role or status.attached:
        return None
    either = by_role.get("hybrid") or next(iter(by_role.values()))
    prefill, decode = by_role.get("prefill", either), by_role.get("decode", either)
    date = time.strftime("%Y-%m-%d %H:%M")
    return of_engines(status.served_model_name, date, prefill, decode, longest, widest)


def engines_table(status: MeasuredStatus) -> str:
    """By engine and kind of step: how many, how long, how well predicted."""
    rows = [
        [process.name, one.kind, str(one.steps), f"{1000 * one.actual_s / one.steps:.1f}", f"{one.mean_error:.0%}"]
        for process in status.processes
        if process.latency is not None
        for one in process.latency.predictions
        if one.steps
    ]
    return console.table(["ENGINE", "STEPS OF", "COUNT", "MS", "ERROR"], rows) if rows else "no steps yet"


def curves(status: MeasuredStatus, longest: int, widest: int) -> dict[str, Curves]:
    """Plots of the models of all engines, by file name. Raises PdctlError without models."""
    from pdctl.bench.report.observations import Curves

    models = {process.name: process.latency for process in status.processes if process.latency is not None}
    if not models:
        raise PdctlError("no engine has a latency model of its own", "leave out --png")
    lengths = [longest * part / 16 for part in range(1, 17)]
    batches = [float(count) for count in range(1, widest + 1)]
    prefill = {name: [(x, 1000 * _prefill_s(model, x)) for x in lengths] for name, model in models.items()}
    decode = {name: [(x, 1000 * _decode_s(model, x)) for x in batches] for name, model in models.items()}
    return {
        "prefill": Curves("Prefill, ms", "prompt tokens", prefill),
        "decode": Curves(f"Decode step with {_CONTEXT} context tokens each, ms", "sequences", decode),
    }


def _prefill_s(model: StepLatency, tokens: float) -> float:
    from pdctl.latency import StepTimes, step_of

    return StepTimes(model.coefficients, model.corrections).seconds(step_of([(round(tokens), 0)]))


def _decode_s(model: StepLatency, batch: float) -> float:
    from pdctl.latency import StepTimes, step_of

    return StepTimes(model.coefficients, model.corrections).seconds(step_of([(1, _CONTEXT)] * round(batch)))
