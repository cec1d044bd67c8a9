"""`pdctl bench`: what a service does under load, as its clients see it."""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pdctl import console
from pdctl.commands.bench_chaos import chaos
from pdctl.commands.bench_compare import compare
from pdctl.commands.bench_keep import draw, drawing, write
from pdctl.commands.bench_load import Load, check_rates, endpoint_of, takes_load, targets_of, vocabulary
from pdctl.commands.bench_profile import profile
from pdctl.commands.bench_watch import Engines, engines_at
from pdctl.commands.common import given_options
from pdctl.errors import PdctlError, Verdict

if TYPE_CHECKING:
    from pdctl.bench.client import Endpoint, Run
    from pdctl.bench.metrics import Figures, Targets
    from pdctl.bench.workload import Vocabulary

app = typer.Typer(help="Measure a service, and compare results.", no_args_is_help=True)


@app.command()
@takes_load
def serve(
    context: typer.Context,
    load: Load,
    url: str = typer.Argument(None, help="The service's address. Default: the running pdctl service's."),
    model: str = typer.Option("", "--model", help="Default: the first that the service lists."),
    key: str = typer.Option("", "--key", envvar="OPENAI_API_KEY", help="API key.", show_default=False),
    repeats: int = typer.Option(1, "--repeats", min=1, max=30, help="The same load so often, with 95% intervals."),
    out: Path | None = typer.Option(None, "--out", help="Write the result as JSON, as vllm bench serve does."),
    page: Path | None = typer.Option(None, "--html", help="Write a page with plots."),
    pictures: Path | None = typer.Option(None, "--png", help="Write plots into this folder."),
    as_json: bool = typer.Option(False, "--json", help="Print the result as JSON on stdout."),
) -> None:
    """Put load on a service and measure it. Ctrl-C ends it and keeps what there is. Exit 1: nothing was answered."""
    from pdctl.bench.metrics import figures, over_runs, pooled

    targets = load.targets
    load.check(given_options(context))
    if pictures is not None:
        drawing()
    endpoint = endpoint_of(url, model, key, load.ignore_eos, load.timeout)
    asked, times = load.requests(vocabulary(endpoint))
    runs: list[Run] = []
    engines = Engines()
    with engines.watched(endpoint.url):
        while len(runs) < repeats and not (runs and runs[-1].was_interrupted):
            runs.append(load.run(endpoint, asked, times))
    run = pooled(runs)
    found = _labelled(figures(run, targets), endpoint, load, len(asked) * len(runs))
    ours = found["pdctl"]
    assert isinstance(ours, dict)
    ours |= {"engines": engines.samples}
    whole = [figures(one, targets) for one in runs if not one.was_interrupted]
    if repeats > 1 and whole:
        ours |= {"repeats": over_runs(whole)}
    _show(found, targets, run, len(asked) * repeats, as_json)
    _keep(found, run, len(asked) * repeats, out, page, pictures)
    if not found["completed"]:
        raise PdctlError("no request was answered", "see the reasons above")


def _labelled(found: Figures, endpoint: Endpoint, load: Load, count: int) -> Figures:
    about: Figures = {
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
    """What a reader of the figures must know."""
    from pdctl.bench.metrics import bottleneck

    note = f"interrupted: {len(run.records)} of {count} requests were sent" if run.was_interrupted else ""
    doubt = bottleneck(run)
    without = sum(not record.has_usage for record in run.records if record.is_good)
    counted = f"{without} answers told no usage: their tokens are counted as events" if without else ""
    return "; ".join(filter(None, [note, f"the client was the bottleneck: {doubt}" if doubt else "", counted]))


def _show(found: Figures, targets: Targets, run: Run, count: int, as_json: bool) -> None:
    from pdctl.bench import report
    from pdctl.bench.metrics import QUANTILES

    console.out(json.dumps(found) if as_json else report.text(found, targets, QUANTILES))
    if note := _doubts(run, count):
        console.note(f"{console.paint('warning:', 'yellow', sys.stderr)} {note}")
    for error in sorted({record.error for record in run.records if record.error})[:3]:
        console.note(f"failed: {error}")


def _keep(found: Figures, run: Run, count: int, out: Path | None, page: Path | None, pictures: Path | None) -> None:
    from pdctl.bench import report
    from pdctl.bench.metrics import QUANTILES

    if out is not None:
        write(out, json.dumps(found))
    if page is not None:
        write(page, report.page(found, "pdctl bench serve", QUANTILES, _doubts(run, count)))
    if pictures is not None:
        draw(pictures, {"": found})


@app.command()
def sweep(
    url: str = typer.Argument(None, help="The service's address. Default: the running pdctl service's."),
    goodput: list[str] = typer.Option(..., "--goodput", help="Targets in ms, such as ttft:500 tpot:50; several."),
    attainment: float = typer.Option(0.9, "--attainment", min=0.01, max=1.0, help="Part that must meet them."),
    first: float = typer.Option(1.0, "--rate", help="The first rate to try, requests a second."),
    seconds: float = typer.Option(20.0, "--seconds", min=1.0, help="How long each rate is tried."),
    inputs: str = typer.Option("256", "--input", help="Tokens of a prompt."),
    outputs: str = typer.Option("64", "--output", help="Tokens of an answer."),
    model: str = typer.Option("", "--model", help="Default: the first that the service lists."),
    key: str = typer.Option("", "--key", envvar="OPENAI_API_KEY", help="API key.", show_default=False),
    seed: int = typer.Option(0, "--seed", help="The same seed asks the same."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON on stdout."),
) -> None:
    """Search the highest rate at which enough answers meet their targets. Exit code 1: not even the lowest did."""
    from pdctl.bench.sweep import Search

    targets = targets_of(goodput)
    check_rates(first, None, 1.0, 1.0, 1.0)
    if math.isinf(first):
        raise PdctlError("--rate inf: the search begins at a rate", "such as --rate 1")
    endpoint = endpoint_of(url, model, key, ignore_eos=True, timeout=600.0)
    words, search, engines = vocabulary(endpoint), Search(first, attainment), engines_at(endpoint.url)
    rows = []
    while (rate := search.next()) is not None:
        step = _step(endpoint, rate, max(8, round(rate * seconds)), (inputs, outputs), words, targets, seed)
        search.tried.append((rate, step["attainment"]))
        rows.append({"rate": rate, **step})
        console.note(f"{rate:.3g} requests/s: {step['attainment']:.0%} met their targets, {step['failed']:.0f} failed")
    rows.sort(key=lambda row: row["rate"])
    if as_json:
        found = {"highest_rate": search.held, "attainment": attainment, "engines": engines, "tried": rows}
        console.out(json.dumps(found, indent=2))
    else:
        console.out(console.table(
            ["REQUESTS/S", "GOODPUT", "MET", "TTFT P99 MS", "TPOT P99 MS"],
            [[f"{row['rate']:.3g}", f"{row['goodput']:.3g}", f"{row['attainment']:.0%}", f"{row['p99_ttft_ms']:.0f}",
              f"{row['p99_tpot_ms']:.0f}"] for row in rows],
        ))  # fmt: skip
        each = f", {search.held / engines:.3g} for each of {engines} engines" if engines else ""
        console.out(f"\nhighest rate at which {attainment:.0%} met their targets: {search.held:.3g} requests/s{each}")
    if not search.held:
        raise PdctlError(f"at no rate did {attainment:.0%} meet their targets", "looser targets, or a smaller load")


def _step(
    endpoint: Endpoint, rate: float, count: int, sizes: tuple[str, str], words: Vocabulary, targets: Targets, seed: int
) -> dict[str, float]:
    """One rate's figures. Those that were refused or failed have met nothing."""
    from pdctl.bench import arrivals, client
    from pdctl.bench import workload as works
    from pdctl.bench.metrics import bottleneck, figures
    from pdctl.bench.report import number

    rng = random.Random(f"{seed}/{rate}")  # noqa: S311 - a workload, not a secret
    into, out = works.lengths(sizes[0], "--input"), works.lengths(sizes[1], "--output")
    asked = works.synthetic(count, into, out, words, rng)
    run = asyncio.run(client.drive(endpoint, asked, arrivals.gamma(count, rate, 1.0, rng), 0, lambda _: None))
    if run.was_interrupted:
        raise KeyboardInterrupt
    if doubt := bottleneck(run):
        console.note(f"{console.paint('warning:', 'yellow', sys.stderr)} the client was the bottleneck: {doubt}")
    found = figures(run, targets)
    met = sum(map(targets.are_met, run.records)) / len(run.records)
    names = ("p99_ttft_ms", "p99_tpot_ms", "failed", "output_throughput")
    return {"attainment": met, "goodput": number(found, "request_goodput"), **{n: number(found, n) for n in names}}


@app.command()
def transfer(
    only: str = typer.Option("", "--transport", help="shm, mooncake or nixl. Default: all."),
    protocol: str = typer.Option("auto", "--protocol", help="auto, tcp or rdma."),
    mib: list[int] = typer.Option([1, 16, 64, 256], "--mib", min=1, max=16384, help="Sizes; several."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON on stdout."),
) -> None:
    """Time each transport by size: in one piece, in blocks of 64 KiB, and 64 bytes; against a copy in memory."""
    from pdctl.doctor import transfer as moving

    for option, value, known in (("--transport", only, moving.BACKENDS), ("--protocol", protocol, moving.PROTOCOLS)):
        if value and value not in known:
            raise PdctlError(f"{option} {value!r} is unknown", f"one of: {', '.join(known)}")
    found = []
    for name in [only] if only else moving.BACKENDS:
        for size in mib:
            console.note(f"{name}: moving {size} MiB between two processes ...")
            found.append(moving.run(moving.Probe(name, protocol, size)) | {"mib": size})
    if as_json:
        console.out(json.dumps(found, indent=2))
    else:
        console.out(moving.by_size(found))
    raise Verdict(moving.exit_code(found))


app.command()(chaos)
app.command()(compare)
app.command()(profile)
