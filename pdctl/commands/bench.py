"""`pdctl bench`: what a service does under load, as its clients see it."""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pdctl import console
from pdctl.commands.bench_chaos import chaos
from pdctl.commands.common import STATE, call, find_service, is_interactive
from pdctl.errors import PdctlError, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from pdctl.bench import Asked
    from pdctl.bench.client import Endpoint, Run
    from pdctl.bench.metrics import Figures, Targets
    from pdctl.bench.workload import Vocabulary

app = typer.Typer(help="Measure a service, and compare results.", no_args_is_help=True)

_TARGETS = ("ttft", "tpot", "e2el")


class Workload(StrEnum):
    """Where prompts come from."""

    SYNTHETIC = "synthetic"
    SHARED_PREFIX = "shared-prefix"
    FILE = "file"
    TRACE = "trace"


@app.command()
def serve(
    url: str = typer.Argument(None, help="The service's address. Default: the running pdctl service's."),
    workload: Workload = typer.Option(Workload.SYNTHETIC, "--workload", help="Where prompts come from."),
    path: Path | None = typer.Option(None, "--data", help="file: JSON lines; trace: Azure's CSV or Mooncake's JSONL."),
    count: int = typer.Option(100, "-n", "--requests", min=0, help="Requests; trace: at most, 0 for all of it."),
    rate: float = typer.Option(math.inf, "--rate", help="Requests a second; inf: all at once."),
    ramp_to: float | None = typer.Option(None, "--ramp-to", help="Change evenly from --rate to this rate."),
    burstiness: float = typer.Option(1.0, "--burstiness", help="1: Poisson; less: bursts; more: steady."),
    concurrency: int = typer.Option(0, "--concurrency", min=0, help="Requests at once, at most; 0: no limit."),
    inputs: str = typer.Option("256", "--input", help="Tokens of a prompt: 512, 100-900, lognormal:500:0.8"),
    outputs: str = typer.Option("64", "--output", help="Tokens of an answer, likewise."),
    prefixes: int = typer.Option(4, "--prefixes", min=1, help="shared-prefix: how many common beginnings."),
    prefix: int = typer.Option(256, "--prefix", min=1, help="shared-prefix: tokens of each."),
    speed: float = typer.Option(1.0, "--speed", help="trace: so many times as fast."),
    length: float = typer.Option(1.0, "--length", help="trace: lengths times this."),
    longest: int = typer.Option(0, "--longest", min=0, help="trace: tokens of prompt and answer at most."),
    warm_up: int = typer.Option(2, "--warm-up", min=0, help="Requests sent first and not counted."),
    goodput: list[str] = typer.Option([], "--goodput", help="Targets in ms, such as ttft:200 tpot:50; several."),
    model: str = typer.Option("", "--model", help="Default: the first that the service lists."),
    key: str = typer.Option("", "--key", envvar="OPENAI_API_KEY", help="API key.", show_default=False),
    seed: int = typer.Option(0, "--seed", help="The same seed asks the same."),
    ignore_eos: bool = typer.Option(True, "--ignore-eos/--heed-eos", help="Answers as long as they were asked for."),
    timeout: float = typer.Option(600.0, "--timeout", min=0.1, help="Seconds for one answer."),
    out: Path | None = typer.Option(None, "--out", help="Write the result as JSON, as vllm bench serve does."),
    page: Path | None = typer.Option(None, "--html", help="Write a page with plots."),
    as_json: bool = typer.Option(False, "--json", help="Print the result as JSON on stdout."),
) -> None:
    """Put load on a service and measure it. Ctrl-C ends it and keeps what there is. Exit 1: nothing was answered."""
    from pdctl.bench import client
    from pdctl.bench.metrics import QUANTILES, bottleneck, figures

    targets = _targets(goodput)
    _check_rates(rate, ramp_to, burstiness, speed, length)
    endpoint = _endpoint(url, model, key, ignore_eos, timeout)
    words = vocabulary(endpoint)
    rng = random.Random(seed)  # noqa: S311 - a workload, not a secret
    asked = _asked(
        workload, path, count, inputs, outputs, (prefixes, prefix), (speed, length, longest), words, rng, seed
    )
    if not asked:
        raise PdctlError("there is nothing to ask", "--requests N, or a trace with lines")
    times = _times(asked, rate, ramp_to, burstiness, rng)
    if warm_up:
        console.note(f"warming up with {warm_up} requests ...")
        first = (asked * (warm_up // len(asked) + 1))[:warm_up]
        asyncio.run(client.drive(endpoint, first, [0.0] * warm_up, 1, lambda _: None))
    run = asyncio.run(client.drive(endpoint, asked, times, concurrency, _progress(len(asked))))
    found = _labelled(figures(run, targets), endpoint, rate, burstiness, concurrency, len(asked))
    _show(found, targets, list(QUANTILES), bottleneck(run), run, len(asked), out, page, as_json)


def _endpoint(url: str | None, model: str, key: str, ignore_eos: bool, timeout: float) -> Endpoint:
    from dataclasses import replace

    from pdctl.bench import client

    headers = f"authorization: Bearer {key}\r\n".encode() if key else b""
    fields: dict[str, object] = {"ignore_eos": True} if ignore_eos else {}
    endpoint = client.Endpoint(url or _running(), model, headers, fields, timeout)
    return replace(endpoint, model=model or asyncio.run(client.models(endpoint))[0])


def _running() -> str:
    status = call(find_service(None, None), "GET", STATE)
    return str(status["proxy_url"])


def _targets(words: list[str]) -> Targets:
    from pdctl.bench.metrics import Targets

    found: dict[str, float] = {}
    for word in " ".join(words).split():
        name, _, limit = word.partition(":")
        try:
            found[name] = float(limit)
        except ValueError:
            found[name] = -1.0
        if name not in _TARGETS or not found[name] > 0:
            raise PdctlError(f"--goodput {word!r} is no target", f"such as ttft:200; names: {', '.join(_TARGETS)}")
    return Targets(**found)


def _check_rates(rate: float, ramp_to: float | None, burstiness: float, speed: float, length: float) -> None:
    for option, value in (
        ("--rate", rate), ("--burstiness", burstiness), ("--speed", speed), ("--length", length),
        ("--ramp-to", 1.0 if ramp_to is None else ramp_to),
    ):  # fmt: skip
        if not value > 0:
            raise PdctlError(f"{option} {value:g}: must be more than 0")
    if ramp_to is not None and math.isinf(rate):
        raise PdctlError("--ramp-to needs a --rate to begin with", "such as --rate 1 --ramp-to 10")


def vocabulary(endpoint: Endpoint) -> Vocabulary:
    """Token ids that prompts for this service may be made of."""
    from pdctl.bench.client import tokenized
    from pdctl.bench.workload import Vocabulary, sentence

    ids = asyncio.run(tokenized(endpoint, sentence()))
    if not ids:
        console.note("the service does not tokenize: prompts are words, and their lengths about right")
    # A first token that only begins texts would be odd in the middle.
    return Vocabulary(tuple(sorted(set(ids[1:]))))


def _asked(
    workload: Workload,
    path: Path | None,
    count: int,
    inputs: str,
    outputs: str,
    shared: tuple[int, int],
    scale: tuple[float, float, int],
    words: Vocabulary,
    rng: random.Random,
    seed: int,
) -> list[Asked]:
    from pdctl.bench import trace
    from pdctl.bench import workload as works

    out = works.lengths(outputs, "--output")
    if workload in (Workload.FILE, Workload.TRACE):
        if path is None:
            raise PdctlError(f"--workload {workload} needs --data FILE")
        if workload is Workload.FILE:
            return works.from_file(path, out, rng)[: count or None]
        speed, length, longest = scale
        return trace.read_trace(path, trace.Scale(speed, length, count, longest=longest), words, seed)
    into = works.lengths(inputs, "--input")
    if workload is Workload.SHARED_PREFIX:
        return works.shared_prefix(count, *shared, into, out, words, rng)
    return works.synthetic(count, into, out, words, rng)


def _times(
    asked: list[Asked], rate: float, ramp_to: float | None, burstiness: float, rng: random.Random
) -> list[float]:
    """A trace has its own, unless a rate is given."""
    from pdctl.bench import arrivals

    own = [request.at for request in asked if request.at is not None]
    if len(own) == len(asked) and math.isinf(rate):
        return own
    if ramp_to is not None:
        return arrivals.ramp(len(asked), rate, ramp_to, rng)
    return arrivals.gamma(len(asked), rate, burstiness, rng)


def _progress(count: int) -> Callable[[Run], None]:
    def show(run: Run) -> None:
        done = sum(record.ended_at > 0 and record.sent_at > 0 for record in run.records)
        failed = sum(bool(record.error) for record in run.records)
        line = f"{done} of {count} done, {len(run.records) - done} running, {failed} failed"
        console.note(f"\r\x1b[K{line}" if is_interactive() else line, end="" if is_interactive() else "\n")

    return show


def _labelled(
    found: Figures, endpoint: Endpoint, rate: float, burstiness: float, concurrency: int, count: int
) -> Figures:
    about: Figures = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai",
        "backend": "openai",
        "label": None,
        "model_id": endpoint.model,
        "tokenizer_id": endpoint.model,
        "num_prompts": count,
        "request_rate": "inf" if math.isinf(rate) else rate,
        "burstiness": burstiness,
        "max_concurrency": concurrency or None,
    }
    return about | found


def _show(
    found: Figures,
    targets: Targets,
    quantiles: list[int],
    doubt: str,
    run: Run,
    count: int,
    out: Path | None,
    page: Path | None,
    as_json: bool,
) -> None:
    from pdctl.bench import report

    if is_interactive():
        console.note("")
    note = f"interrupted: {len(run.records)} of {count} requests were sent" if run.was_interrupted else ""
    if doubt:
        note = "; ".join(filter(None, [note, f"the client was the bottleneck: {doubt}"]))
    console.out(json.dumps(found) if as_json else report.text(found, targets, quantiles))
    if note:
        console.note(f"{console.paint('warning:', 'yellow', sys.stderr)} {note}")
    errors = {record.error for record in run.records if record.error}
    for error in sorted(errors)[:3]:
        console.note(f"failed: {error}")
    for target, text in ((out, json.dumps(found)), (page, report.page(found, "pdctl bench serve", quantiles, note))):
        if target is not None:
            _write(target, text)
    if not found["completed"]:
        raise PdctlError("no request was answered", "see the reasons above")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as failure:
        raise PdctlError(f"{path} cannot be written: {failure.strerror}") from None
    console.note(f"written: {path}")


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

    targets = _targets(goodput)
    _check_rates(first, None, 1.0, 1.0, 1.0)
    endpoint = _endpoint(url, model, key, ignore_eos=True, timeout=600.0)
    words, search = vocabulary(endpoint), Search(first, attainment)
    rows = []
    while (rate := search.next()) is not None:
        step = _step(endpoint, rate, max(8, round(rate * seconds)), (inputs, outputs), words, targets, seed)
        search.tried.append((rate, step["attainment"]))
        rows.append({"rate": rate, **step})
        console.note(f"{rate:.3g} requests/s: {step['attainment']:.0%} met their targets, {step['failed']:.0f} failed")
    rows.sort(key=lambda row: row["rate"])
    if as_json:
        console.out(json.dumps({"highest_rate": search.held, "attainment": attainment, "tried": rows}, indent=2))
    else:
        console.out(console.table(
            ["REQUESTS/S", "GOODPUT", "MET", "TTFT P99 MS", "TPOT P99 MS"],
            [[f"{row['rate']:.3g}", f"{row['goodput']:.3g}", f"{row['attainment']:.0%}", f"{row['p99_ttft_ms']:.0f}",
              f"{row['p99_tpot_ms']:.0f}"] for row in rows],
        ))  # fmt: skip
        console.out(f"\nhighest rate at which {attainment:.0%} met their targets: {search.held:.3g} requests/s")
    if not search.held:
        raise PdctlError(f"at no rate did {attainment:.0%} meet their targets", "looser targets, or a smaller load")


def _step(
    endpoint: Endpoint, rate: float, count: int, sizes: tuple[str, str], words: Vocabulary, targets: Targets, seed: int
) -> dict[str, float]:
    """One rate's figures. Those that were refused or failed have met nothing."""
    from pdctl.bench import arrivals, client
    from pdctl.bench import workload as works
    from pdctl.bench.metrics import figures
    from pdctl.bench.report import number

    rng = random.Random(f"{seed}/{rate}")  # noqa: S311 - a workload, not a secret
    into, out = works.lengths(sizes[0], "--input"), works.lengths(sizes[1], "--output")
    asked = works.synthetic(count, into, out, words, rng)
    run = asyncio.run(client.drive(endpoint, asked, arrivals.gamma(count, rate, 1.0, rng), 0, lambda _: None))
    if run.was_interrupted:
        raise KeyboardInterrupt
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


@app.command()
def compare(
    first: Path = typer.Argument(..., help="A result of bench serve --out."),
    second: Path = typer.Argument(..., help="The one that it is compared with."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON on stdout."),
) -> None:
    """Ratios of two results, first over second, with 95% bootstrap intervals."""
    from dataclasses import asdict

    from pdctl.bench import compare as comparing

    found = comparing.compare(comparing.read(first), comparing.read(second))
    if not found:
        raise PdctlError("the two results have nothing in common that could be compared")
    if as_json:
        console.out(json.dumps([{**asdict(ratio), "verdict": ratio.verdict} for ratio in found], indent=2))
        return
    rows = [
        [r.name, f"{r.first:.4g}", f"{r.second:.4g}", f"{r.ratio:.3f}", f"{r.low:.3f} to {r.high:.3f}", r.verdict]
        for r in found
    ]
    console.out(console.table(["", "FIRST", "SECOND", "RATIO", "95%", ""], rows))
