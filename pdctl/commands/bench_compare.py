"""`pdctl bench compare`: two results, or two topologies that are started in turn under one load."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pdctl import console
from pdctl.commands.bench_keep import draw, drawing, write
from pdctl.commands.bench_load import (
    BurstOption,
    ConcurrencyOption,
    CountOption,
    DataOption,
    EosOption,
    GoodputOption,
    InputOption,
    LengthOption,
    Load,
    LongestOption,
    OutputOption,
    PrefixesOption,
    PrefixOption,
    RampOption,
    RateOption,
    SeedOption,
    SpeedOption,
    TimeoutOption,
    WarmUpOption,
    Workload,
    WorkloadOption,
    endpoint_of,
    targets_of,
    vocabulary,
)
from pdctl.commands.common import STATE, call, find_service, running_services
from pdctl.errors import PdctlError
from pdctl.host.users import run_root

if TYPE_CHECKING:
    from pdctl.bench.client import Run
    from pdctl.bench.compare import Ratio
    from pdctl.bench.metrics import Figures, Targets

# Weights are loaded, a model may be made ready first.
_START_S, _STOP_S = 1800.0, 180.0


def compare(
    context: typer.Context,
    first: Path = typer.Argument(..., help="A topology (.toml), or a result of bench serve --out."),
    second: Path = typer.Argument(..., help="The one that it is compared with, of the same kind."),
    rounds: int = typer.Option(3, "--rounds", min=1, max=30, help="Topologies: each is started so often, in turn."),
    workload: WorkloadOption = Workload.SYNTHETIC,
    path: DataOption = None,
    count: CountOption = 100,
    rate: RateOption = math.inf,
    ramp_to: RampOption = None,
    burstiness: BurstOption = 1.0,
    concurrency: ConcurrencyOption = 0,
    inputs: InputOption = "256",
    outputs: OutputOption = "64",
    prefixes: PrefixesOption = 4,
    prefix: PrefixOption = 256,
    speed: SpeedOption = 1.0,
    length: LengthOption = 1.0,
    longest: LongestOption = 0,
    warm_up: WarmUpOption = 4,
    goodput: GoodputOption = [],  # noqa: B006 - typer's default, never changed
    seed: SeedOption = 0,
    ignore_eos: EosOption = True,
    timeout: TimeoutOption = 600.0,
    out: Path | None = typer.Option(None, "--out", help="Topologies: write both results into this folder."),
    page: Path | None = typer.Option(None, "--html", help="Write a page with plots of both."),
    pictures: Path | None = typer.Option(None, "--png", help="Write plots of both into this folder."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON on stdout."),
) -> None:
    """Ratios of two results, first over second, with 95% intervals. Of two topologies, each is started in turn, gets
    the same load, and is stopped. Their services must not be running."""
    if pictures is not None:
        drawing()
    targets = targets_of(goodput)
    kinds = {one.suffix == ".toml" for one in (first, second)}
    if len(kinds) > 1:
        raise PdctlError(f"{first} and {second} are not of one kind", "two topologies (.toml), or two results")
    names = _titles(first, second)
    if kinds == {False}:
        _refuse_load_options(context)
        from pdctl.bench.compare import read, with_goodput

        results = (read(first), read(second))
        if targets.are_any:
            results = (with_goodput(results[0], targets), with_goodput(results[1], targets))
    else:
        load = Load(workload, path, count, rate, ramp_to, burstiness, concurrency, inputs, outputs,
                    (prefixes, prefix), (speed, length, longest), warm_up, seed)  # fmt: skip
        load.check()
        results = _measured((first, second), load, rounds, targets, ignore_eos, timeout)
    _tell(results, names, as_json)
    _keep(results, names, out, page, pictures)


def _titles(first: Path, second: Path) -> tuple[str, str]:
    """Short, and different."""
    if first.stem != second.stem:
        return first.stem, second.stem
    named = [f"{path.parent.name}-{path.stem}".lstrip("-") for path in (first, second)]
    return (named[0], named[1]) if named[0] != named[1] else (f"{named[0]}-1", f"{named[1]}-2")


_OF_RESULTS = {"first", "second", "goodput", "page", "pictures", "as_json"}


def _refuse_load_options(context: typer.Context) -> None:
    """Two results have been measured: nothing is asked again. Raises PdctlError."""
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if getattr(source, "name", "") == "COMMANDLINE" and parameter.name not in _OF_RESULTS:
            raise PdctlError(f"{parameter.opts[0]} is for topologies; these are results", "leave it out")


# -- topologies --------------------------------------------------------------------------------------------


def _measured(
    files: tuple[Path, Path], load: Load, rounds: int, targets: Targets, ignore_eos: bool, timeout: float
) -> tuple[Figures, Figures]:
    """Each in turn, the order changing from round to round, so that a machine that grows slow is slow for both."""
    from pdctl.bench.metrics import figures, over_runs, pooled

    for file in files:
        _refuse_running(file, find_service(None, file))
    runs: tuple[list[Run], list[Run]] = ([], [])
    for number in range(rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            console.note(f"round {number + 1} of {rounds}: {files[side]}")
            runs[side].append(_one(files[side], load, ignore_eos, timeout))
            if runs[side][-1].was_interrupted:
                raise KeyboardInterrupt
    found = []
    for side in (0, 1):
        whole = figures(pooled(runs[side]), targets)
        ours = whole["pdctl"]
        assert isinstance(ours, dict)
        ours["repeats"] = over_runs([figures(run, targets) for run in runs[side]])
        found.append(whole)
    return found[0], found[1]


def _refuse_running(file: Path, name: str) -> None:
    """What runs already is somebody's, and not ours to stop. Raises PdctlError."""
    from pdctl.supervisor.adoption import read_estate
    from pdctl.supervisor.rundir import is_locked

    run_dir = run_root() / name
    if name in running_services() or is_locked(run_dir) or read_estate(run_dir) is not None:
        raise PdctlError(f"service {name!r} of {file} is running", f"end it first: pdctl down -s {name}")


def _one(file: Path, load: Load, ignore_eos: bool, timeout: float) -> Run:
    with _service(file) as url:
        endpoint = endpoint_of(url, "", "", ignore_eos, timeout)
        asked, times = load.requests(vocabulary(endpoint))
        return load.run(endpoint, asked, times)


@contextmanager
def _service(file: Path) -> Iterator[str]:
    """Its proxy's address, while it is up. Raises PdctlError with `up`'s own words."""
    name = find_service(None, file)
    _refuse_running(file, name)
    is_up = False
    try:
        _pdctl(["up", "-d", "-f", str(file)], _START_S)
        is_up = True
        yield str(call(name, "GET", STATE)["proxy_url"])
    finally:
        # What was interrupted in starting must not stay either; what refused to start has said why.
        with contextlib.nullcontext() if is_up else contextlib.suppress(PdctlError):
            _pdctl(["down", "-s", name], _STOP_S)


def _pdctl(words: list[str], within_s: float) -> None:
    argv = [sys.executable, "-m", "pdctl", *words]
    # Out of the terminal's reach: a Ctrl-C must not leave half a service.
    with subprocess.Popen(
        argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            try:
                _, said = process.communicate(timeout=within_s)
            except KeyboardInterrupt:
                console.note("interrupted: ending what was begun ...")
                process.communicate(timeout=within_s)
                raise
        except subprocess.TimeoutExpired:
            process.kill()
            raise PdctlError(f"pdctl {' '.join(words)}: not done within {within_s:.0f} s") from None
    if process.returncode:
        raise PdctlError(f"pdctl {' '.join(words)} failed:\n{said.strip()}")


# -- both --------------------------------------------------------------------------------------------------


def _keep(
    results: tuple[Figures, Figures], names: tuple[str, str], out: Path | None, page: Path | None, pictures: Path | None
) -> None:
    from pdctl.bench import report

    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise PdctlError(f"{out} cannot be made: {failure.strerror}") from None
        for name, figures in zip(names, results, strict=True):
            write(out / f"{name}.json", json.dumps(figures))
    both = dict(zip(names, results, strict=True))
    if page is not None:
        write(page, report.comparison(both, _rows(results), " against ".join(names)))
    if pictures is not None:
        draw(pictures, both)


def _rows(results: tuple[Figures, Figures]) -> list[list[str]]:
    from pdctl.bench.compare import compare as ratios

    return [
        [r.name, f"{r.first:.4g}", f"{r.second:.4g}", f"{r.ratio:.3f}", r.interval, r.verdict] for r in ratios(*results)
    ]


def _tell(results: tuple[Figures, Figures], names: tuple[str, str], as_json: bool) -> None:
    from pdctl.bench.compare import compare as ratios

    found = ratios(*results)
    if not found:
        raise PdctlError("the two results have nothing in common that could be compared")
    if as_json:
        console.out(json.dumps([{**asdict(ratio), "verdict": ratio.verdict} for ratio in found], indent=2))
        return
    console.out(console.table(["", names[0].upper(), names[1].upper(), "RATIO", "95%", ""], _rows(results)))
    console.out("")
    for line in verdicts(found, names[0]):
        console.out(line)


def verdicts(found: list[Ratio], name: str) -> list[str]:
    """Where the first is better, where it is worse, where nothing was shown."""
    told = {
        f"{name} is better in": [r for r in found if r.is_shown and r.is_better],
        f"{name} is worse in": [r for r in found if r.is_shown and not r.is_better],
        "no difference shown in": [r for r in found if not r.is_shown],
    }
    return [
        f"{words}: {', '.join(f'{r.name} ({r.ratio:.2f}x)' for r in ratios)}"
        for words, ratios in told.items()
        if ratios
    ]
