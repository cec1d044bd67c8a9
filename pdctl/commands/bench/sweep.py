"""`pdctl bench sweep`: find the highest rate at which enough requests meet their targets."""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pdctl import console
from pdctl.commands.bench.keep import drawing, keep_curves
from pdctl.commands.bench.load import check_rates, endpoint_of, targets_of, vocabulary
from pdctl.commands.bench.watch import engines_at
from pdctl.errors import PdctlError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pdctl.bench.client import Endpoint
    from pdctl.bench.measurements import Targets
    from pdctl.bench.report.observations import Curves
    from pdctl.bench.sweep import Search
    from pdctl.bench.workload import Vocabulary

_HEADER = ["REQUESTS/S", "GOODPUT", "MET", "TTFT P99 MS", "TPOT P99 MS"]
# Latency columns, and the count that they are percentiles over: with a count of 0 there is no value.
_TIMES = {"p99_ttft_ms": "completed", "p99_tpot_ms": "streams"}


def sweep(
    url: str = typer.Argument(None, help="Service URL. Default: the running pdctl service."),
    goodput: list[str] = typer.Option(..., "--goodput", help="Targets in ms, such as ttft:500 tpot:50. Repeatable."),
    attainment: float = typer.Option(
        0.9, "--attainment", min=0.01, max=1.0, help="Fraction of requests that must meet the targets."
    ),
    first: float = typer.Option(1.0, "--rate", help="First rate to try, in requests per second."),
    seconds: float = typer.Option(20.0, "--seconds", min=1.0, help="Duration of each step in seconds."),
    inputs: str = typer.Option("256", "--input", help="Prompt length in tokens: 512, 100-900 or lognormal:500:0.8."),
    outputs: str = typer.Option("64", "--output", help="Answer length in tokens, in the same forms."),
    model: str = typer.Option("", "--model", help="Model name. Default: the first model that the service lists."),
    key: str = typer.Option(
        "", "--key", envvar=["PDCTL_API_KEY", "OPENAI_API_KEY"], help="API key for the service.", show_default=False
    ),
    seed: int = typer.Option(0, "--seed", help="Random seed: same seed, same requests."),
    page: Path | None = typer.Option(None, "--html", help="Write an HTML page with plots to this file."),
    pictures: Path | None = typer.Option(None, "--png", help="Write plots as PNG files into this folder."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON on stdout."),
) -> None:
    """Find the highest rate at which enough requests meet their targets. Exit code 1: no rate was low enough."""
    from pdctl.bench.sweep import Search

    targets = targets_of(goodput)
    if pictures is not None:
        drawing()
    check_rates(first, None, 1.0, 1.0, 1.0)
    if math.isinf(first):
        raise PdctlError("--rate inf: the search needs a finite first rate", "such as --rate 1")
    endpoint = endpoint_of(url, model, key, ignore_eos=True, timeout=600.0)
    words, search, engines = vocabulary(endpoint), Search(first, attainment), engines_at(endpoint.url)

    def measure(rate: float) -> tuple[dict[str, float], str]:
        return _step(endpoint, rate, max(8, round(rate * seconds)), (inputs, outputs), words, targets, seed)

    rows, notes = _searched(search, measure)
    was_interrupted = search.next() is not None
    each = f", {search.held / engines:.3g} for each of {engines} engines" if engines else ""
    said = f"highest rate at which {attainment:.0%} met their targets: {search.held:.3g} requests/s{each}"
    table = (_HEADER, [_row(row) for row in rows])
    if as_json:
        found = {"highest_rate": search.held, "attainment": attainment, "engines": engines, "tried": rows,
                 "notes": notes}  # fmt: skip
        console.out(json.dumps(found, indent=2))
    else:
        console.out(f"{console.table(*table)}\n\n{said}")
    keep_curves(_curves(rows, attainment), "pdctl bench sweep", said, table, page, pictures, "; ".join(notes))
    if was_interrupted:
        raise KeyboardInterrupt
    if not search.held:
        raise PdctlError(
            f"at no rate did {attainment:.0%} meet their targets",
            "loosen the targets, or use shorter prompts and answers",
        )


def _searched(
    search: Search, measure: Callable[[float], tuple[dict[str, float], str]]
) -> tuple[list[dict[str, float]], list[str]]:
    """Measure at each rate that the search wants. Returns a row per rate, by rate, and warnings for the reader."""
    rows: list[dict[str, float]] = []
    notes: list[str] = []
    try:
        while (rate := search.next()) is not None:
            step, doubt = measure(rate)
            search.tried.append((rate, step["attainment"]))
            rows.append({"rate": rate, **step})
            console.note(
                f"{rate:.3g} requests/s: {step['attainment']:.0%} met their targets, {step['failed']:.0f} failed"
            )
            if doubt:
                notes.append(f"at {rate:.3g} requests/s the client was the bottleneck: {doubt}")
                console.note(f"{console.paint('warning:', 'yellow', sys.stderr)} {notes[-1]}")
    except KeyboardInterrupt:
        if not rows:
            raise
        notes.append("interrupted: the search is incomplete")
        console.note(f"{console.paint('warning:', 'yellow', sys.stderr)} {notes[-1]}")
    return sorted(rows, key=lambda row: row["rate"]), notes


def _step(
    endpoint: Endpoint, rate: float, count: int, sizes: tuple[str, str], words: Vocabulary, targets: Targets, seed: int
) -> tuple[dict[str, float], str]:
    """The measurements at one rate, and why the client may have distorted them. Refused and failed requests count as
    not having met their targets."""
    from pdctl.bench import arrivals, client
    from pdctl.bench import workload as works
    from pdctl.bench.measurements import bottleneck, measurements
    from pdctl.bench.report.observations import number

    rng = random.Random(f"{seed}/{rate}")  # noqa: S311 - a workload, not a secret
    into, out = works.lengths(sizes[0], "--input"), works.lengths(sizes[1], "--output")
    asked = works.synthetic(count, into, out, words, rng)
    run = asyncio.run(client.drive(endpoint, asked, arrivals.gamma(count, rate, 1.0, rng), 0, lambda _: None))
    if run.was_interrupted:
        raise KeyboardInterrupt
    found = measurements(run, targets)
    met = sum(map(targets.are_met, run.records)) / len(run.records)
    names = ("p99_ttft_ms", "p99_tpot_ms", "completed", "failed", "output_throughput")
    # Goodput relative to the request rate: the time after the last request was sent does not count.
    several = sum(record.is_good and record.output_tokens > 1 for record in run.records)
    step = {"attainment": met, "goodput": met * rate, "streams": several, **{n: number(found, n) for n in names}}
    return step, bottleneck(run)


def _row(row: dict[str, float]) -> list[str]:
    return [
        f"{row['rate']:.3g}", f"{row['goodput']:.3g}", f"{row['attainment']:.0%}",
        *(f"{row[name]:.0f}" if row[of] else "-" for name, of in _TIMES.items()),
    ]  # fmt: skip


def _curves(rows: list[dict[str, float]], attainment: float) -> dict[str, Curves]:
    """Curves by file name. Request rate and goodput share a plot: the limit is where they part. Steps without answers
    have no latencies."""
    from pdctl.bench.report.observations import Curves

    def line(name: str) -> list[tuple[float, float]]:
        return [(row["rate"], row[name]) for row in rows if name not in _TIMES or row[_TIMES[name]]]

    across = "requests sent per second"
    return {
        "goodput": Curves("Goodput, requests/s", across, {"sent": line("rate"), "goodput": line("goodput")}),
        "met": Curves(
            "Fraction of requests that met the targets", across,
            {"met": line("attainment"), "wanted": [(row["rate"], attainment) for row in rows]},
        ),
        "ttft": Curves("TTFT p99, ms", across, {"TTFT p99": line("p99_ttft_ms")}),
        "tpot": Curves("TPOT p99, ms", across, {"TPOT p99": line("p99_tpot_ms")}),
    }  # fmt: skip
