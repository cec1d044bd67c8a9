"""The data of plots, taken from a result: measured by pdctl, or read from a file that another tool wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdctl.bench.measurements import Measurements

# A time span: begin, end.
Stretch = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Curves:
    """Lines through measured points. `title`: label of the y axis with its unit; `across`: label of the x axis.
    `lines`: points (x, y) by name."""

    title: str
    across: str
    lines: dict[str, list[tuple[float, float]]]

    @property
    def places(self) -> list[float]:
        """All x values, in order."""
        return sorted({across for line in self.lines.values() for across, _ in line})


def number(measurements: Measurements, name: str) -> float:
    """A measurement that is a number; 0 if it is missing."""
    value = measurements.get(name, 0.0)
    return float(value) if isinstance(value, int | float) else 0.0


def series(measurements: Measurements) -> dict[str, list[float]]:
    """The samples that plots show, in milliseconds."""
    ttfts, itls, latencies = (_good(measurements, name) for name in ("ttfts", "itls", "latencies"))
    gaps = [float(gap) for gaps in itls if isinstance(gaps, list) for gap in gaps]
    lists: tuple[Sequence[object], ...] = (ttfts, gaps, latencies)
    named = zip(("Time to first token", "Inter-token latency", "End-to-end latency"), lists, strict=True)
    return {name: [value * 1000 for value in values if isinstance(value, float)] for name, values in named}


def _good(measurements: Measurements, name: str) -> list[object]:
    """Values of answered requests. A refusal is fast but not an answer."""
    values, errors, ttfts = listed(measurements, name), listed(measurements, "errors"), listed(measurements, "ttfts")
    if len(errors) != len(values) or len(ttfts) != len(values):
        return values
    return [value for value, error, ttft in zip(values, errors, ttfts, strict=True) if not error and ttft]


def sampled(measurements: Measurements) -> tuple[list[float], dict[str, dict[str, list[float | None]]]]:
    """The samples of engines: seconds since the first request, and per engine a list for each field. Samples of the
    warm-up are left out."""
    ours = measurements.get("pdctl")
    found = ours.get("engines") if isinstance(ours, dict) else None
    if not isinstance(found, dict) or not found.get("at"):
        return [], {}
    sent = [at for at in listed(measurements, "start_times") if isinstance(at, float) and at]
    start = min(sent, default=found["at"][0])
    first = sum(at < start for at in found["at"])
    engines = {
        name: {what: values[first:] for what, values in lists.items()} for name, lists in found["engines"].items()
    }
    return [at - start for at in found["at"][first:]], engines


def listed(measurements: Measurements, name: str) -> list[object]:
    """A list in the result; empty if it is missing."""
    value = measurements.get(name)
    return value if isinstance(value, list) else []


def spans(measurements: Measurements) -> list[tuple[float, float, float]]:
    """For each request: sent, first token, end, in seconds of one clock."""
    starts, ttfts, latencies = (listed(measurements, name) for name in ("start_times", "ttfts", "latencies"))
    return [
        (float(start), float(start) + float(ttft), float(start) + float(latency))
        for start, ttft, latency in zip(starts, ttfts, latencies, strict=False)
        if isinstance(start, float) and isinstance(ttft, float) and isinstance(latency, float)
    ]


def on_engines(measurements: Measurements) -> dict[str, list[Stretch]]:
    """For each engine, the time spans of its requests: on the prefill engine from the end of queueing to the first
    token, on the decode engine from then to the end. Empty if the service did not report engines."""
    ours = measurements.get("pdctl")
    placed = ours.get("placed") if isinstance(ours, dict) else None
    times = spans(measurements)
    if not isinstance(placed, list) or len(placed) != len(times):
        return {}
    prefills: dict[str, list[Stretch]] = {}
    decodes: dict[str, list[Stretch]] = {}
    for place, (sent, first, end) in zip(placed, times, strict=True):
        if not place or first == sent:
            continue
        prefill, decode, queued = place
        if prefill and prefill != decode:
            prefills.setdefault(prefill, []).append((min(sent + queued, first), first))
        decodes.setdefault(decode, []).append((sent + queued if prefill in ("", decode) else first, end))
    names = [*sorted(prefills), *(name for name in sorted(decodes) if name not in prefills)]
    return {name: prefills.get(name, []) + decodes.get(name, []) for name in names}


def in_rows(stretches: Sequence[Stretch]) -> list[list[Stretch]]:
    """Arrange spans in the fewest rows without overlap: each goes into the first row that is free at its begin."""
    rows: list[list[Stretch]] = []
    for stretch in sorted(stretches):
        row = next((row for row in rows if row[-1][1] <= stretch[0]), None)
        if row is None:
            rows.append([stretch])
        else:
            row.append(stretch)
    return rows


def joined(row: Sequence[Stretch], least: float) -> list[Stretch]:
    """A row's spans in order, with spans merged that are too short or too close to be distinguished."""
    found: list[Stretch] = []
    for begin, end in row:
        if found and end - found[-1][0] < least:
            found[-1] = (found[-1][0], end)
        else:
            found.append((begin, end))
    return found
