"""`pdctl bench sweep`: the highest rate at which enough answers meet their targets."""

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
    from pdctl.bench.client import Endpoint
    from pdctl.bench.metrics import Targets
    from pdctl.bench.report.observations import Curves
    from pdctl.bench.workload import Vocabulary

_HEADER = ["REQUESTS/S", "GOODPUT", "MET", "TTFT P99 MS", "TPOT P99 MS"]
# Times, and whose they are: there are none where that is 0.
_TIMES = {"p99_ttft_ms": "completed", "p99_tpot_ms": "streams"}


def sweep(
    url: str = typer.Argument(None, help="The service's address. Default: the running pdctl service's."),
    goodput: list[str] = typer.Option(..., "--goodput", help="Targets in ms, such as ttft:500 tpot:50; several."),
    attainment: float = typer.Option(0.9, "--attainment", min=0.01, max=1.0, help="Part that must meet them."),
    first: float = typer.Option(1.0, "--rate", help="The first rate to try, requests a second."),
    seconds: float = typer.Option(20.0, "--seconds", min=1.0, help="How long each rate is tried."),
    inputs: str = typer.Option("256", "--input", help="Tokens of a prompt."),
    outputs: str = typer.Option("64", "--output", help="Tokens of an answer."),
    model: str = typer.Option("", "--model", help="Default: the first that the service lists."),
    key: str = typer.Option(
        "", "--key", envvar=["PDCTL_API_KEY", "OPENAI_API_KEY"], help="API key.", show_default=False
    ),
    seed: int = typer.Option(0, "--seed", help="The same seed asks the same."),
    page: Path | None = typer.Option(None, "--html", help="Write a page with plots."),
    pictures: Path | None = typer.Option(None, "--png", help="Write plots into this folder."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON on stdout."),
) -> None:
    """Search the highest rate at which enough answers meet their targets. Exit code 1: not even the lowest did."""
    from pdctl.bench.sweep import Search

    targets = targets_of(goodput)
    if pictures is not None:
        drawing()
    check_rates(first, None, 1.0, 1.0, 1.0)
    if math.isinf(first):
        raise PdctlError("--rate inf: the search begins at a rate", "such as --rate 1")
    endpoint = endpoint_of(url, model, key, ignore_eos=True, timeout=600.0)
    words, search, engines = vocabulary(endpoint), Search(first, attainment), engines_at(endpoint.url)
    rows: list[dict[str, float]] = []
    notes: list[str] = []
    try:
        while (rate := search.next()) is not None:
            step, doubt = _step(endpoint, rate, max(8, round(rate * seconds)), (inputs, outputs), words, targets, seed)
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
        notes.append("interrupted: the search is not at its end")
        console.note(f"{console.paint('warning:', 'yellow', sys.stderr)} {notes[-1]}")
    was_interrupted = search.next() is not None
    rows.sort(key=lambda row: row["rate"])
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
        raise PdctlError(f"at no rate did {attainment:.0%} meet their targets", "looser targets, or a smaller load")


def _step(
    endpoint: Endpoint, rate: float, count: int, sizes: tuple[str, str], words: Vocabulary, targets: Targets, seed: int
) -> tuple[dict[str, float], str]:
    """One rate's figures, and why the client is not to be trusted with them. Those that were refused or failed have met
    nothing."""
    from pdctl.bench import arrivals, client
    from pdctl.bench import workload as works
    from pdctl.bench.metrics import bottleneck, measurements
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
    # Of what is asked a second: the last answers' end, after nothing more is asked, is not the service's rate.
    several = sum(record.is_good and record.output_tokens > 1 for record in run.records)
    step = {"attainment": met, "goodput": met * rate, "streams": several, **{n: number(found, n) for n in names}}
    return step, bottleneck(run)


def _row(row: dict[str, float]) -> list[str]:
    return [
        f"{row['rate']:.3g}", f"{row['goodput']:.3g}", f"{row['attainment']:.0%}",
        *(f"{row[name]:.0f}" if row[of] else "-" for name, of in _TIMES.items()),
    ]  # fmt: skip


def _curves(rows: list[dict[str, float]], attainment: float) -> dict[str, Curves]:
    """By file name. What is asked stands beside what came of it: the frontier is where they part. Where nothing was
    answered there are no times."""
    from pdctl.bench.report.observations import Curves

    def line(name: str) -> list[tuple[float, float]]:
        return [(row["rate"], row[name]) for row in rows if name not in _TIMES or row[_TIMES[name]]]

    across = "requests asked a second"
    return {
        "goodput": Curves("Goodput, requests/s", across, {"asked": line("rate"), "goodput": line("goodput")}),
        "met": Curves(
            "Part that met the targets", across,
            {"met": line("attainment"), "wanted": [(row["rate"], attainment) for row in rows]},
        ),
        "ttft": Curves("TTFT p99, ms", across, {"TTFT p99": line("p99_ttft_ms")}),
        "tpot": Curves("TPOT p99, ms", across, {"TPOT p99": line("p99_tpot_ms")}),
    }  # fmt: skip
