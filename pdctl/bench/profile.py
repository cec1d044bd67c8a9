"""The latency model of a service: prefill time by prompt length, decode step time by batch size and context lengths.

Prefill: a + b*l + c*l^2. Decode: a + b*(sum of contexts) + c*batch (DistServe's simulator; Zhong et al., OSDI 2024).
Fitted by least squares of the *relative* error, because steps differ by orders of magnitude, with non-negative
coefficients. Its error is measured on held-out points. Engines with a latency model of their own need no measurement.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pdctl.bench.measurements import percentile
from pdctl.control_api import StepLatency
from pdctl.latency.fit import Sums

_HELD_OUT = 0.4
PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement: prompt tokens, or the sum of contexts and the batch size, and the seconds it took."""

    kind: str
    tokens: float
    batch: int
    seconds: float

    @property
    def row(self) -> tuple[float, float, float]:
        """The factors of the coefficients."""
        last = self.tokens * self.tokens if self.kind == PREFILL else float(self.batch)
        return (1.0, self.tokens, last)


@dataclass(frozen=True, slots=True)
class Line:
    """The coefficients for one kind of step, with the mean and 90th percentile of the relative error on held-out
    points; `points`: numbers of fitted and held-out points."""

    coefficients: tuple[float, float, float]
    error: float
    error_p90: float
    points: tuple[int, int]

    def seconds(self, row: Sequence[float]) -> float:
        """The predicted seconds."""
        return sum(a * x for a, x in zip(self.coefficients, row, strict=True))


@dataclass(frozen=True, slots=True)
class Profile:
    """Both lines of one service. `longest`: tokens of the longest measured prompt; `widest`: the largest batch."""

    model: str
    date: str
    prefill: Line
    decode: Line
    longest: int
    widest: int

    def ttft_s(self, tokens: int) -> float:
        """Predicted TTFT of a prompt on an idle service."""
        return self.prefill.seconds(Point(PREFILL, tokens, 1, 0.0).row)

    def tpot_s(self, batch: int, context: int) -> float:
        """Predicted TPOT with `batch` streams of `context` tokens each."""
        return self.decode.seconds(Point(DECODE, batch * context, batch, 0.0).row)


def fit(points: Sequence[Point], seed: int = 0) -> Line:
    """Fit a line to some of the points and measure its error on the rest. Raises ValueError for too few points."""
    if len(points) < 8:
        raise ValueError(f"{len(points)} measurements are too few to fit a line")
    mixed = list(points)
    random.Random(seed).shuffle(mixed)  # noqa: S311 - which are held out
    cut = round(len(mixed) * (1 - _HELD_OUT))
    fitted, held_out = mixed[:cut], mixed[cut:]
    line = Line(_coefficients(fitted), 0.0, 0.0, (0, 0))
    errors = [abs(line.seconds(point.row) / point.seconds - 1) for point in held_out]
    return Line(line.coefficients, statistics.fmean(errors), percentile(errors, 90), (len(fitted), len(held_out)))


def _coefficients(points: Sequence[Point]) -> tuple[float, float, float]:
    sums = Sums.empty(3)
    for point in points:
        sums.add(point.row, point.seconds)
    first, second, third = sums.solve()
    return first, second, third


def of_engines(model: str, date: str, prefill: StepLatency, decode: StepLatency, longest: int, widest: int) -> Profile:
    """The profile of engines that have models of their own; both may be the same one."""
    per_step, per_token, attention, per_sequence, _ = (prefill.corrections[0] * one for one in prefill.coefficients)
    first = Line((per_step + per_sequence, per_token, attention / 2), *_accuracy(prefill, PREFILL))
    per_step, per_token, _, per_sequence, context = (decode.corrections[1] * one for one in decode.coefficients)
    later = Line((per_step, context, per_token + per_sequence), *_accuracy(decode, DECODE))
    return Profile(model, date, first, later, longest, widest)


def _accuracy(model: StepLatency, kind: str) -> tuple[float, float, tuple[int, int]]:
    """The mean relative error of the predictions so far, and their number: each was made before its step, so it counts
    as held out. An engine keeps no percentile of one kind's errors: 0."""
    found = next(one for one in model.predictions if one.kind == kind)
    return found.mean_error, 0.0, (0, found.steps)


def path_of(state_root: Path, service: str) -> Path:
    """The path of a service's profile."""
    return state_root / service / "profile.json"


def save(path: Path, profile: Profile) -> None:
    """Write a profile atomically. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"schema": 1, **asdict(profile)}, indent=2))
    new.replace(path)


def load(path: Path) -> Profile | None:
    """Read a profile; None if it is missing or unreadable."""
    try:
        found = json.loads(path.read_text())
        return Profile(
            str(found["model"]), str(found["date"]), _line(found[PREFILL]), _line(found[DECODE]),
            int(found["longest"]), int(found["widest"]),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _line(found: dict[str, object]) -> Line:
    a, b, c = (float(value) for value in _numbers(found["coefficients"]))
    (error,), (p90,) = _numbers([found["error"]]), _numbers([found["error_p90"]])
    fitted, held_out = _numbers(found["points"])
    return Line((a, b, c), error, p90, (int(fitted), int(held_out)))


def _numbers(value: object) -> list[float]:
    if not isinstance(value, list) or not all(isinstance(one, int | float) for one in value):
        raise ValueError("not a list of numbers")
    return [float(one) for one in value]
