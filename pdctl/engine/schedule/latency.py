"""The latency model of a running engine: fitted to its steps, and corrected while it runs."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

import msgspec

from pdctl.engine.schedule.batch import Slice
from pdctl.engine.schedule.running import Running
from pdctl.latency import KINDS, Accuracy, Kind, Step, StepTimes, Work, step_of
from pdctl.latency.fit import Sums

# Before anything was measured: a small model on one CPU core.
_UNKNOWN = StepTimes((0.0, 1e-3, 0.0, 0.0, 0.0))
# Weight of the newest step in the correction of its kind, and the limits of a correction.
_NEWEST = 0.1
_CORRECTIONS = (0.3, 3.0)
# Each step takes this factor of weight from the earlier ones of its kind: about 200 steps of each count (recursive
# least squares). Kinds forget apart, or hours of decoding would leave nothing known about prompts.
_KEEP = 0.995
# Steps between two fits, and those before the first. A fit takes about a millisecond.
_REFIT_STEPS = 64
_FEWEST_STEPS = 16
# The newest steps of each kind, from which a new fit takes its corrections: what was forgotten in part still counts.
_NEWEST_STEPS = 9
# Ratios of actual to predicted seconds that are kept for the percentile, which is renewed every few steps.
_RATIOS = 128
_RENEW_STEPS = 16
_SLOW = 0.9
# A step that took so many times its prediction says more about the machine than about the model: the process stood
# still. It corrects, within the limits, but is not fitted.
_PAUSE = 5.0
# No step takes less, so no prediction is 0.
_SHORTEST_S = 1e-7


# The measured steps by kind.
Measured = dict[Kind, Sums]


class LatencyModel:
    """Predicts steps, and learns from each. `measured`: steps that were measured earlier."""

    def __init__(self, measured: Measured | None = None) -> None:
        self.measured: Measured = measured or {kind: Sums.empty(len(Step().row)) for kind in KINDS}
        self.accuracy: dict[Kind, Accuracy] = {kind: Accuracy() for kind in KINDS}
        self.times = _UNKNOWN
        self.is_fitted = False
        self._newest: dict[Kind, deque[tuple[Step, float]]] = {kind: deque(maxlen=_NEWEST_STEPS) for kind in KINDS}
        self._ratios: deque[float] = deque(maxlen=_RATIOS)
        self._steps = 0
        if measured is not None:
            self._fit()

    def work(self, tokens: int, before: int, budget: int) -> float:
        """Predicted seconds to compute so many tokens of a prompt after so many others."""
        return self.times.prompt_s(tokens, before, budget)

    def work_left(self, running: Running, waiting: int, budget: int) -> Work:
        """What an engine has to compute. `waiting`: tokens of prompts of which nothing is computed."""
        prefill, decode, mixed = (self.accuracy[kind] for kind in KINDS)
        return Work(
            times=self.times,
            budget=budget,
            prompt_tokens=waiting + sum(sequence.num_missing for sequence in running.partial.values()),
            decodes=len(running.decoding),
            context=sum(sequence.num_computed for sequence in running.decoding.values()),
            accuracy=(prefill, decode, mixed),
        )

    def note(self, batch: Sequence[Slice], seconds: float) -> None:
        """Take the duration of a step."""
        if batch and seconds > 0:
            parts = [part for piece in batch for part in (piece.parts if piece.drafts else (piece,))]
            self.took(step_of([(part.num_rows, part.start) for part in parts]), seconds)

    def took(self, step: Step, seconds: float) -> None:
        """The same, for a step that is described."""
        predicted = self._predicted(step)
        if self.is_fitted:
            self._judge(step.kind, predicted, seconds)
        self._steps += 1
        ratio = seconds / predicted
        if not self.is_fitted or ratio < _PAUSE:
            self.measured[step.kind].add(step.row, seconds, _KEEP)
        is_first = not self._newest[step.kind]
        self._newest[step.kind].append((step, seconds))
        if self._steps % _REFIT_STEPS == 0 or (not self.is_fitted and self._steps >= _FEWEST_STEPS):
            self._fit()
        else:
            self._correct(step.kind, ratio, is_first)
        self._ratios.append(ratio)
        if self._steps % _RENEW_STEPS == 0:
            self.times = msgspec.structs.replace(self.times, slow=self._slow())

    def _predicted(self, step: Step) -> float:
        # A fit to few steps can have only factors that this one lacks.
        return max(self.times.seconds(step), _SHORTEST_S)

    def _judge(self, kind: Kind, predicted: float, seconds: float) -> None:
        steps, actual_s, predicted_s, error = msgspec.structs.astuple(self.accuracy[kind])
        error += abs(predicted / seconds - 1)
        self.accuracy[kind] = Accuracy(steps + 1, actual_s + seconds, predicted_s + predicted, error)

    def _fit(self) -> None:
        a, b, c, d, e = Sums.together(list(self.measured.values())).solve()
        if b <= 0 and c <= 0:
            # Only decodes so far: a prompt must not seem free.
            b = self.times.coefficients[1] * self.times.corrections[0]
        slow = self.times.slow if self.is_fitted else 1.0
        self.times = StepTimes((a, b, c, d, e), slow=slow)
        self.is_fitted = True
        for kind, newest in self._newest.items():
            if newest:
                ratios = [seconds / self._predicted(step) for step, seconds in newest]
                self._set(kind, statistics.median(ratios))

    def _correct(self, kind: Kind, ratio: float, is_first: bool) -> None:
        # What is not fitted yet takes its first measurement as it is.
        weight = 1.0 if is_first and not self.is_fitted else _NEWEST
        self._set(kind, self.times.corrections[KINDS.index(kind)] * (1 + weight * (ratio - 1)))

    def _set(self, kind: Kind, correction: float) -> None:
        least, most = _CORRECTIONS if self.is_fitted else (1e-6, 1e6)
        corrections = list(self.times.corrections)
        corrections[KINDS.index(kind)] = min(max(correction, least), most)
        first, second, third = corrections
        self.times = msgspec.structs.replace(self.times, corrections=(first, second, third))

    def _slow(self) -> float:
        ordered = sorted(self._ratios)
        return ordered[int(_SLOW * (len(ordered) - 1))]
