"""Plots as PNG files, made with matplotlib, of one result or of several together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from pdctl.bench.measurements import Measurements, percentile
from pdctl.bench.report.observations import Curves, in_rows, on_engines, sampled, series, spans

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (7.0, 3.2)
_DPI = 130
_FILES = {"Time to first token": "ttft", "Inter-token latency": "itl", "End-to-end latency": "e2e"}
_OVER_TIME = {"running": "requests running", "kv_used": "fraction of KV in use", "leases": "leases on KV"}


def pictures(folder: Path, results: dict[str, Measurements]) -> list[str]:
    """Write the plots and return their file names. Raises OSError."""
    found = []
    shown = {name: series(measurements) for name, measurements in results.items()}
    for metric, file in _FILES.items():
        lines = {name: values[metric] for name, values in shown.items() if values[metric]}
        if lines:
            found.append(_cdf(folder / f"{file}.png", metric, lines))
    for measurements in results.values() if len(results) == 1 else ():
        found += [*_lanes(folder / "requests.png", measurements), *_engines(folder, measurements)]
    return found


def curve_pictures(folder: Path, found: dict[str, Curves]) -> list[str]:
    """Write curves, given by file name, and return the names of the files. Raises OSError."""
    return [_curve(folder / f"{name}.png", curves) for name, curves in found.items() if curves.places]


def _curve(path: Path, curves: Curves) -> str:
    figure, axes = _axes(curves.across, curves.title)
    places = curves.places
    for name, line in curves.lines.items():
        axes.plot([places.index(across) for across, _ in line], [up for _, up in line], marker="o", label=name)
    axes.set_xticks(range(len(places)), [f"{place:.4g}" for place in places])
    return _saved(figure, axes, path, True)


def _lanes(path: Path, measurements: Measurements) -> list[str]:
    engines = on_engines(measurements)
    if not engines:
        return []
    start = min(sent for sent, *_ in spans(measurements))
    figure, axes = _axes("seconds", "requests on each engine")
    at = 0
    for number, (name, stretches) in enumerate(engines.items()):
        for place, row in enumerate(in_rows(stretches)):
            bars = [(begin - start, end - begin) for begin, end in row]
            # One legend entry per engine.
            axes.broken_barh(bars, (at, 0.8), facecolors=f"C{number}", label="_" if place else name)
            at += 1
    axes.set_yticks([])
    return [_saved(figure, axes, path, True, (at, 0))]


def _cdf(path: Path, title: str, lines: dict[str, list[float]]) -> str:
    figure, axes = _axes(f"{title}, ms", "fraction")
    most = max(percentile(values, 99.5) for values in lines.values())
    for name, values in lines.items():
        ordered = sorted(values)
        axes.plot(ordered, [(n + 1) / len(ordered) for n in range(len(ordered))], label=name or None)
    axes.set_xlim(0, most)
    return _saved(figure, axes, path, "" not in lines)


def _engines(folder: Path, measurements: Measurements) -> list[str]:
    times, engines = sampled(measurements)
    found = []
    for what, title in _OVER_TIME.items() if times else ():
        figure, axes = _axes("seconds", title)
        for name, lists in engines.items():
            values = [float("nan") if value is None else value for value in lists[what]]
            axes.plot(times, values, label=name)
        found.append(_saved(figure, axes, folder / f"{what}.png", True))
    return found


def _axes(below: str, left: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(below)
    axes.set_ylabel(left)
    axes.grid(alpha=0.3)
    return figure, axes


def _saved(
    figure: Figure, axes: Axes, path: Path, is_named: bool, limits: tuple[float | None, float | None] = (0, None)
) -> str:
    # After drawing: limits set earlier would not adapt to the data.
    bottom, top = limits
    axes.set_ylim(bottom, top)
    if is_named:
        axes.legend()
    figure.savefig(path, dpi=_DPI)
    return path.name
