"""`pdctl bench compare`: compare two results, or two topologies that are started in turn under the same load."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pdctl import console
from pdctl.commands.bench.keep import draw, drawing, write
from pdctl.commands.bench.load import Load, endpoint_of, takes_load, vocabulary
from pdctl.commands.bench.predicted import beside, predictions, table
from pdctl.commands.common import control, find_service, given_options, running_services
from pdctl.errors import PdctlError
from pdctl.host import program
from pdctl.host.users import run_root

if TYPE_CHECKING:
    from pdctl.bench.client import Run
    from pdctl.bench.compare import Ratio
    from pdctl.bench.measurements import Measurements, Targets

# A start loads weights and may convert the model first.
_START_S, _STOP_S = 1800.0, 180.0
# An interrupted start gets this long to finish before it is killed, seconds.
_HURRIED_S, _LOOK_S = 60.0, 0.1


@takes_load
def compare(
    context: typer.Context,
    load: Load,
    first: Path = typer.Argument(..., help="Topology (.toml) or result file of bench serve --out."),
    second: Path = typer.Argument(..., help="Topology or result file to compare with; same kind as the first."),
    more: list[Path] = typer.Argument(None, help="With results: more of them, each compared with the first."),
    rounds: int = typer.Option(
        3, "--rounds", min=1, max=30, help="With topologies: how many times each is started and measured."
    ),
    simulated: bool = typer.Option(
        False, "--simulated", help="With topologies: also predict both, and print predicted beside measured."
    ),
    profile: Path | None = typer.Option(
        None, "--profile", help="With --simulated: how fast the engines are. See: pdctl simulate --help."
    ),
    out: Path | None = typer.Option(None, "--out", help="With topologies: write both results into this folder."),
    page: Path | None = typer.Option(None, "--html", help="Write an HTML page with plots of both to this file."),
    pictures: Path | None = typer.Option(None, "--png", help="Write plots of both as PNG files into this folder."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON on stdout."),
) -> None:
    """Print the ratios of two results, first over second, with 95% intervals. Two topologies are measured first: each
    is started in turn, gets the same load, and is stopped. Their services must not be running."""
    if pictures is not None:
        drawing()
    targets, given, files = load.targets, given_options(context), (first, second, *(more or ()))
    are_topologies = _kind_of(files)
    expected: list[Measurements] = []
    if not are_topologies:
        _refuse_load_options(given)
        from pdctl.bench.compare import read, with_goodput

        results = tuple(map(read, files))
        if targets.are_any:
            results = tuple(with_goodput(result, targets) for result in results)
    else:
        load.check(given)
        if profile is not None and not simulated:
            raise PdctlError("--profile does nothing without --simulated", "add it")
        # Before the measurement: engines learn from that.
        expected = predictions((first, second), load, profile) if simulated else []
        results = _measured((first, second), load, rounds)
    found = dict(zip(_titles(files), results, strict=True))
    _tell(found, expected, as_json)
    _keep(found, out, page, pictures)


def _kind_of(files: Sequence[Path]) -> bool:
    """Whether these are topologies, not results. Raises PdctlError for a mixture, and for more than two topologies."""
    kinds = {one.suffix == ".toml" for one in files}
    if len(kinds) > 1:
        told = f"{', '.join(map(str, files[:-1]))} and {files[-1]} are of different kinds"
        raise PdctlError(told, "give two topologies (.toml), or results")
    if kinds == {True} and len(files) > 2:
        hint = "measure them in pairs with --out FOLDER, then compare the results"
        raise PdctlError("only two topologies can be measured in turn", hint)
    return kinds == {True}


def _titles(files: Sequence[Path]) -> list[str]:
    """Short, distinct titles of the files: their names, with the folder or a number where these are the same."""
    for named in ([path.stem for path in files], [f"{path.parent.name}-{path.stem}".lstrip("-") for path in files]):
        if len(set(named)) == len(named):
            return named
    return [f"{name}-{number}" for number, name in enumerate(named, 1)]


_OF_RESULTS = {"first", "second", "more", "goodput", "page", "pictures", "as_json"}


def _refuse_load_options(given: dict[str, str]) -> None:
    """Raise PdctlError for load options: two results are already measured."""
    for name, written in given.items():
        if name not in _OF_RESULTS:
            raise PdctlError(f"{written} works only with topologies; these are results", "leave it out")


# -- topologies --------------------------------------------------------------------------------------------


def _measured(files: tuple[Path, Path], load: Load, rounds: int) -> tuple[Measurements, Measurements]:
    """Measure both topologies in turn. The order alternates between rounds, so that a machine that slows down affects
    both. After an interrupt, only complete rounds count."""
    for file in files:
        _refuse_running(file, find_service(None, file))
    whole: list[tuple[Run, Run]] = []
    try:
        for number in range(rounds):
            runs: dict[int, Run] = {}
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                console.note(f"round {number + 1} of {rounds}: {files[side]}")
                runs[side] = _one(files[side], load)
            whole.append((runs[0], runs[1]))
    except KeyboardInterrupt:
        if not whole:
            raise
        mark = console.paint("warning:", "yellow", sys.stderr)
        console.note(f"{mark} interrupted: {len(whole)} of {rounds} rounds are complete; the results are for these")
    first, second = zip(*whole, strict=True)
    return _result(first, load.targets), _result(second, load.targets)


def _result(runs: Sequence[Run], targets: Targets) -> Measurements:
    """The measurements of all rounds together, with those of each round."""
    from pdctl.bench.measurements import measurements, over_runs, pooled

    found = measurements(pooled(runs), targets)
    ours = found["pdctl"]
    assert isinstance(ours, dict)
    ours["repeats"] = over_runs([measurements(run, targets) for run in runs])
    return found


def _refuse_running(file: Path, name: str) -> None:
    """Raise PdctlError if the service is already running: it is in use, and not ours to stop."""
    from pdctl.host.processes.presence import supervisor_of
    from pdctl.supervisor.rundir.adoption import read_adoptable

    run_dir = run_root() / name
    if name in running_services() or supervisor_of(run_dir) is not None or read_adoptable(run_dir) is not None:
        raise PdctlError(f"service {name!r} of {file} is running", f"stop it first: pdctl down -s {name}")


def _one(file: Path, load: Load) -> Run:
    """Start, measure and stop one topology. Raises KeyboardInterrupt after an interrupt, when the service is down."""
    with _service(file) as url:
        endpoint = endpoint_of(url, "", "", load.ignore_eos, load.timeout, load.chat)
        asked, times = load.requests(vocabulary(endpoint))
        run = load.run(endpoint, asked, times)
    if run.was_interrupted:
        raise KeyboardInterrupt
    return run


@contextmanager
def _service(file: Path) -> Iterator[str]:
    """Start the service, yield its proxy's URL, and stop it. Raises PdctlError with the message of `up`."""
    name = find_service(None, file)
    _refuse_running(file, name)
    is_up = False
    try:
        _pdctl(["up", "-d", "-f", str(file)], _START_S)
        is_up = True
        yield control(name).status(measurements=False).proxy_url
    finally:
        # Also stop a service whose start was interrupted. If it refused to start, keep that error.
        with contextlib.nullcontext() if is_up else contextlib.suppress(PdctlError):
            _pdctl(["down", "-s", name], _STOP_S)


def _pdctl(words: list[str], within_s: float) -> None:
    """Run one verb to its end. Ctrl-C is held back until then, or for a while: half a service must not be left.

    Raises PdctlError, KeyboardInterrupt.
    """
    argv = program.pdctl(*words)
    # In its own session: a terminal sends Ctrl-C to the whole foreground process group.
    with (
        _held_back() as interrupted,
        subprocess.Popen(
            argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
        ) as process,
    ):
        said = _until_done(process, time.monotonic() + within_s, interrupted)
        if said is None:
            process.kill()
    if said is None:
        raise PdctlError(f"pdctl {' '.join(words)}: not done within {within_s:.0f} s")
    if process.returncode:
        raise PdctlError(f"pdctl {' '.join(words)} failed:\n{said.strip()}")


def _until_done(process: subprocess.Popen[str], deadline: float, interrupted: threading.Event) -> str | None:
    """What it wrote to stderr; None if it is not done in time. An interrupt shortens the time."""
    is_hurried = False
    while time.monotonic() < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=_LOOK_S)[1]
        if interrupted.is_set() and not is_hurried:
            is_hurried, deadline = True, min(deadline, time.monotonic() + _HURRIED_S)
            console.note("interrupted: waiting for the current step ...")
    return None


@contextmanager
def _held_back() -> Iterator[threading.Event]:
    """Hold back Ctrl-C and raise it at the end; the event tells whether there was one. A KeyboardInterrupt could
    otherwise come between the start of a process and the assignment of its handle."""
    interrupted = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted.is_set():
        raise KeyboardInterrupt


# -- both --------------------------------------------------------------------------------------------------


def _keep(results: dict[str, Measurements], out: Path | None, page: Path | None, pictures: Path | None) -> None:
    from pdctl.bench.report import page as report

    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise PdctlError(f"{out} cannot be made: {failure.strerror}") from None
        for name, measurements in results.items():
            write(out / f"{name}.json", json.dumps(measurements))
    if page is not None:
        found = {name: _rows(ratios) for name, ratios in _ratios(results).items()}
        write(page, report.comparison(results, found, " vs. ".join(results)))
    if pictures is not None:
        draw(pictures, results)


def _ratios(results: dict[str, Measurements]) -> dict[str, list[Ratio]]:
    """The ratios of the first result over each other one, by the name of that."""
    from pdctl.bench.compare import compare as ratios

    first, *others = results
    return {name: ratios(results[first], results[name]) for name in others}


def _rows(found: list[Ratio]) -> list[list[str]]:
    return [[r.name, f"{r.first:.4g}", f"{r.second:.4g}", f"{r.ratio:.3f}", r.interval, r.verdict] for r in found]


def _tell(results: dict[str, Measurements], expected: Sequence[Measurements], as_json: bool) -> None:
    found, first = _ratios(results), next(iter(results))
    for name, ratios in found.items():
        if not ratios:
            raise PdctlError(f"{first} and {name} have no measurement in common")
    pairs = list(zip(results.values(), expected, strict=False))
    if as_json:
        _tell_json(found, pairs)
        return
    for number, (name, ratios) in enumerate(found.items()):
        table_of = console.table(["", first.upper(), name.upper(), "RATIO", "95%", ""], _rows(ratios))
        console.out(("\n" if number else "") + table_of + "\n")
        for line in verdicts(ratios, first):
            console.out(line)
    if pairs:
        console.out("\n" + table(list(results), pairs))


def _tell_json(found: dict[str, list[Ratio]], pairs: Sequence[tuple[Measurements, Measurements]]) -> None:
    """Two results as a list of ratios; more of them by the name of the second."""
    by_name = {name: [{**asdict(one), "verdict": one.verdict} for one in ratios] for name, ratios in found.items()}
    told: object = by_name if len(by_name) > 1 else next(iter(by_name.values()))
    if pairs:
        told = {"ratios": told, "predicted": [[asdict(one) for one in beside(*pair)] for pair in pairs]}
    console.out(json.dumps(told, indent=2))


def verdicts(found: list[Ratio], name: str) -> list[str]:
    """Lines that name where the first is better, where it is worse, and where no difference was shown."""
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
