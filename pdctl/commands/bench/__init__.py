"""`pdctl bench`: measure a service under load, as its clients experience it."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pdctl import console
from pdctl.commands.bench.chaos import chaos
from pdctl.commands.bench.compare import compare
from pdctl.commands.bench.keep import draw, drawing, write
from pdctl.commands.bench.load import Load, endpoint_of, takes_load, vocabulary
from pdctl.commands.bench.profile import profile
from pdctl.commands.bench.sweep import sweep
from pdctl.commands.bench.transfer import transfer
from pdctl.commands.bench.watch import Engines
from pdctl.commands.common import given_options
from pdctl.errors import PdctlError

if TYPE_CHECKING:
    from pdctl.bench.client import Endpoint, Run
    from pdctl.bench.measurements import Measurements, Targets

app = typer.Typer(help="Measure a service under load and compare results.", no_args_is_help=True, rich_markup_mode=None,
                  add_completion=False)  # fmt: skip


@app.command()
@takes_load
def serve(
    context: typer.Context,
    load: Load,
    url: str = typer.Argument(None, help="Service URL. Default: the running pdctl service."),
    model: str = typer.Option("", "--model", help="Model name. Default: the first model that the service lists."),
    key: str = typer.Option(
        "", "--key", envvar=["PDCTL_API_KEY", "OPENAI_API_KEY"], help="API key for the service.", show_default=False
    ),
    repeats: int = typer.Option(
        1, "--repeats", min=1, max=30, help="Repeat the load N times and report 95% intervals."
    ),
    out: Path | None = typer.Option(
        None, "--out", help="Write the result to this JSON file, in the format of vllm bench serve."
    ),
    page: Path | None = typer.Option(None, "--html", help="Write an HTML page with plots to this file."),
    pictures: Path | None = typer.Option(None, "--png", help="Write plots as PNG files into this folder."),
    as_json: bool = typer.Option(False, "--json", help="Print the result as JSON on stdout."),
) -> None:
    """Put load on a service and measure it. Ctrl-C ends the run and keeps the results so far. Exit code 1: no request
    was answered."""
    from pdctl.bench.measurements import measurements, over_runs, pooled

    targets = load.targets
    load.check(given_options(context))
    if pictures is not None:
        drawing()
    endpoint = endpoint_of(url, model, key, load.ignore_eos, load.timeout, load.chat)
    asked, times = load.requests(vocabulary(endpoint))
    runs: list[Run] = []
    engines = Engines()
    with engines.watched(endpoint.url):
        while len(runs) < repeats and not (runs and runs[-1].was_interrupted):
            runs.append(load.run(endpoint, asked, times))
    run = pooled(runs)
    found = _labelled(measurements(run, targets), endpoint, load, len(asked) * len(runs))
    ours = found["pdctl"]
    assert isinstance(ours, dict)
    ours |= {"engines": engines.samples}
    whole = [measurements(one, targets) for one in runs if not one.was_interrupted]
    if repeats > 1 and whole:
        ours |= {"repeats": over_runs(whole)}
    _show(found, targets, run, len(asked) * repeats, as_json)
    _keep(found, run, len(asked) * repeats, out, page, pictures)
    if not found["completed"]:
        raise PdctlError("no request was answered", "see the errors above")


def _labelled(found: Measurements, endpoint: Endpoint, load: Load, count: int) -> Measurements:
    about: Measurements = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai",
        "backend": "openai",
        "label": None,
        "model_id": endpoint.model,
        "tokenizer_id": endpoint.model,
        "num_prompts": count,
        "request_rate": "inf" if math.isinf(load.rate) else load.rate,
        "burstiness": load.burstiness,
        "max_concurrency": load.concurrency or None,
    }
    return about | found


def _doubts(run: Run, count: int) -> str:
    """Caveats that a reader of the measurements must know."""
    from pdctl.bench.measurements import bottleneck

    note = f"interrupted: {len(run.records)} of {count} requests were sent" if run.was_interrupted else ""
    doubt = bottleneck(run)
    without = sum(not record.has_usage for record in run.records if record.is_good)
    counted = f"{without} answers reported no usage: each event is counted as one token" if without else ""
    return "; ".join(filter(None, [note, f"the client was the bottleneck: {doubt}" if doubt else "", counted]))


def _show(found: Measurements, targets: Targets, run: Run, count: int, as_json: bool) -> None:
    from pdctl.bench.measurements import QUANTILES
    from pdctl.bench.report import page as report

    console.out(json.dumps(found) if as_json else report.text(found, targets, QUANTILES))
    if note := _doubts(run, count):
        console.note(f"{console.paint('warning:', 'yellow', sys.stderr)} {note}")
    for error in sorted({record.error for record in run.records if record.error})[:3]:
        console.note(f"failed: {error}")


def _keep(
    found: Measurements, run: Run, count: int, out: Path | None, page: Path | None, pictures: Path | None
) -> None:
    from pdctl.bench.measurements import QUANTILES
    from pdctl.bench.report import page as report

    if out is not None:
        write(out, json.dumps(found))
    if page is not None:
        write(page, report.page(found, "pdctl bench serve", QUANTILES, _doubts(run, count)))
    if pictures is not None:
        draw(pictures, {"": found})


app.command()(chaos)
app.command()(compare)
app.command()(profile)
app.command()(sweep)
app.command()(transfer)
