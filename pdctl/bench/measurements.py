"""Measurements of a run, with the names and units of vLLM's `bench serve`, so that its JSON readers can read them.

TTFT: from sending to the first event with a choice. TPOT: (E2E - TTFT) / (output tokens - 1), for each answer of more
than one token. ITL: all gaps between such events, pooled. Goodput: answers per second that meet every target. Failed
and truncated requests are counted separately, because refusing requests must not look like serving them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pdctl.bench import Record
from pdctl.bench.client import Run

Measurements = dict[str, object]
QUANTILES = (50, 90, 99)
_METRICS = ("ttft", "tpot", "itl", "e2el")


@dataclass(frozen=True, slots=True)
class Targets:
    """Latency targets in milliseconds; None for no target."""

    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None

    @property
    def are_any(self) -> bool:
        """Whether there is any target."""
        return any(limit is not None for limit in (self.ttft, self.tpot, self.e2el))

    def are_met(self, record: Record) -> bool:
        """Whether one answer meets the targets. An answer of one token has no TPOT and always meets that target."""
        values = ((self.ttft, record.ttft), (self.tpot, record.tpot), (self.e2el, record.latency))
        return record.is_good and all(limit is None or value * 1000 <= limit for limit, value in values)


def percentile(values: Sequence[float], part: float) -> float:
    """A percentile, linearly interpolated as numpy does by default; 0 if there are no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = part / 100 * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def samples(records: Sequence[Record]) -> dict[str, list[float]]:
    """Samples of each metric in milliseconds, of complete answers."""
    good = [record for record in records if record.is_good]
    return {
        "ttft": [record.ttft * 1000 for record in good],
        "tpot": [record.tpot * 1000 for record in good if record.output_tokens > 1],
        "itl": [gap * 1000 for record in good for gap in record.gaps],
        "e2el": [record.latency * 1000 for record in good],
    }


def measurements(run: Run, targets: Targets, quantiles: Sequence[int] = QUANTILES) -> Measurements:
    """The measurements of one run. The caller leaves out the warm-up."""
    records, seconds = run.records, max(1e-9, run.ended_at - run.started_at)
    good = [record for record in records if record.is_good]
    inputs, outputs = sum(r.input_tokens for r in good), sum(r.output_tokens for r in good)
    found: Measurements = {
        "duration": seconds,
        "completed": len(good),
        "failed": sum(bool(record.error) for record in records),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / seconds,
        "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds,
        "max_concurrent_requests": run.most_at_once,
        "input_lens": [record.input_tokens for record in records],
        "output_lens": [record.output_tokens for record in records],
        "ttfts": [record.ttft if record.first_at else 0.0 for record in records],
        "itls": [record.gaps for record in records],
        "latencies": [record.latency for record in records],
        "start_times": [record.sent_at for record in records],
        "generated_texts": [record.text for record in records],
        "errors": [record.error for record in records],
    }
    if targets.are_any:
        found["request_goodput"] = sum(map(targets.are_met, good)) / seconds
    for name, values in samples(records).items():
        found |= _statistics(name, values, quantiles)
    return found | {"pdctl": _ours(run, targets)}


def _statistics(name: str, values: list[float], quantiles: Sequence[int]) -> Measurements:
    found: Measurements = {
        f"mean_{name}_ms": statistics.fmean(values) if values else 0.0,
        f"median_{name}_ms": percentile(values, 50),
        f"std_{name}_ms": statistics.pstdev(values) if values else 0.0,
    }
    return found | {f"p{part}_{name}_ms": percentile(values, part) for part in quantiles}


def _ours(run: Run, targets: Targets) -> Measurements:
    """Measurements that vLLM's tool does not report."""
    records = run.records
    late = [record.sent_at - record.planned_at for record in records if record.sent_at]
    return {
        "schema": 1,
        "truncated": sum(record.is_truncated for record in records),
        "interrupted": run.was_interrupted,
        "attainment": sum(map(targets.are_met, records)) / len(records) if records and targets.are_any else None,
        "met": [int(targets.are_met(record)) for record in records] if targets.are_any else None,
        "placed": [_placed(record) for record in records] if any(record.engines for record in records) else None,
        "parts_ms": {
            name: {f"p{part}": percentile(values, part) for part in QUANTILES}
            for name, values in _parts(records).items()
        },
        "client": {
            "cpu_of_a_core": run.headroom.cpu,
            "delay_p99_ms": run.headroom.delay_p99 * 1000,
            "sent_late_p99_ms": percentile(late, 99) * 1000,
            "is_bottleneck": bottleneck(run) != "",
        },
    }


def _placed(record: Record) -> list[str | float] | None:
    """A request's prefill engine, decode engine, and seconds in the queue; None if the service did not report them."""
    if "decode" not in record.engines:
        return None
    return [record.engines.get("prefill", ""), record.engines["decode"], record.parts.get("queue", 0.0)]


def _parts(records: Sequence[Record]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for record in records:
        for name, seconds in record.parts.items():
            found.setdefault(name, []).append(seconds * 1000)
    return found


def bottleneck(run: Run) -> str:
    """Why the client may have distorted these measurements; "" if it has not."""
    gaps = [gap for record in run.records for gap in record.gaps]
    usual, delay = percentile(gaps, 50), run.headroom.delay_p99
    if run.headroom.cpu > 0.85:
        return f"it used {run.headroom.cpu:.0%} of a core, so it measured partly itself"
    if usual and delay > max(0.5 * usual, 0.002):
        return f"it woke up {delay * 1000:.1f} ms late at p99, with {usual * 1000:.1f} ms between events"
    return ""


def pooled(runs: Sequence[Run]) -> Run:
    """Several runs of one load as one run: all records, and the sum of their durations."""
    assert runs, "at least one run"
    whole = Run(records=[record for run in runs for record in run.records])
    whole.ended_at = sum(run.ended_at - run.started_at for run in runs)
    whole.most_at_once = max(run.most_at_once for run in runs)
    whole.headroom.cpu = max(run.headroom.cpu for run in runs)
    whole.headroom.delays = [delay for run in runs for delay in run.headroom.delays]
    whole.was_interrupted = any(run.was_interrupted for run in runs)
    return whole


def over_runs(found: Sequence[Measurements]) -> Measurements:
    """For each measurement, its values in these runs, their mean, and its 95% interval (Student's t)."""
    runs: dict[str, list[float]] = {}
    for figures_ in found:
        for name, value in figures_.items():
            if isinstance(value, int | float) and name.endswith(("_ms", "_throughput", "_goodput")):
                runs.setdefault(name, []).append(float(value))
    means = {name: statistics.fmean(values) for name, values in runs.items()}
    half = {name: half_width(values) for name, values in runs.items()}
    return {
        "count": len(found),
        "runs": runs,
        "mean": means,
        "low": {name: means[name] - half[name] for name in runs},
        "high": {name: means[name] + half[name] for name in runs},
    }


# 97.5th percentile of Student's t by degrees of freedom, from 1 on; 1.96 beyond.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
      2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045)  # fmt: skip


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95% interval of a mean; 0 for a single value."""
    freedom = len(values) - 1
    if freedom < 1:
        return 0.0
    factor = _T[freedom - 1] if freedom <= len(_T) else 1.96
    return factor * statistics.stdev(values) / math.sqrt(len(values))
