"""`pdctl bench profile`: show the latency model of a running service and keep it for `pdctl plan`.

Builtin engines have a model of their own, fitted to their steps. Other services are measured from outside."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pdctl import console
from pdctl.commands.bench.keep import draw_curves, drawing
from pdctl.commands.bench.load import endpoint_of, vocabulary
from pdctl.commands.bench.own_models import curves, engines_table, own_profile
from pdctl.commands.common import FileOption, JsonOption, ServiceOption, control, find_service
from pdctl.errors import PdctlError

if TYPE_CHECKING:
    from pdctl.bench import Asked, Record
    from pdctl.bench.client import Endpoint
    from pdctl.bench.profile import Line, Point, Profile
    from pdctl.bench.workload import Vocabulary
    from pdctl.control_api import MeasuredStatus

_STEPS = 24
# Tries with longer answers, when streams end before the last one of their batch has begun.
_TRIES = 4
_DATE = "%Y-%m-%d %H:%M"


def profile(
    measure: bool = typer.Option(
        False, "--measure", help="Measure from outside also where the engines have their own models."
    ),
    longest: int = typer.Option(512, "--longest", min=64, help="Length of the longest prompt in tokens."),
    widest: int = typer.Option(8, "--widest", min=2, max=256, help="Largest number of concurrent streams."),
    repeats: int = typer.Option(3, "--repeats", min=2, max=20, help="Number of measurements of each kind and size."),
    out: Path | None = typer.Option(
        None, "--out", help="File to write. Default: the one in the service's state folder that `pdctl plan` reads."
    ),
    png: Path | None = typer.Option(None, "--png", help="Folder for plots of the engines' own models."),
    seed: int = typer.Option(0, "--seed", help="Random seed: same seed, same requests."),
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
    as_json: bool = JsonOption,
) -> None:
    """Show the latency model of the running service, and keep it for `pdctl plan`. Builtin engines know theirs from
    their own steps; other services are measured, and should be otherwise idle."""
    from pdctl.bench.profile import path_of, save
    from pdctl.host.users import state_root

    name = find_service(service, file)
    status = control(name).status()
    if png is not None:
        drawing()
    own = None if measure else own_profile(status, longest, widest)
    found = own or _measure(status, longest, widest, repeats, seed)
    target = out or path_of(state_root(), name)
    try:
        save(target, found)
    except OSError as failure:
        raise PdctlError(f"{target} cannot be written: {failure.strerror}") from None
    if png is not None:
        draw_curves(png, curves(status, longest, widest))
    if as_json:
        console.out(json.dumps({"schema": 1, **asdict(found)}, indent=2))
    else:
        _tell(found)
        if own is not None:
            console.out("\n" + engines_table(status))
    console.note(f"kept in {target}")


def _measure(status: MeasuredStatus, longest: int, widest: int, repeats: int, seed: int) -> Profile:
    """Measure from outside. Raises PdctlError."""
    from pdctl.bench.profile import DECODE, PREFILL, Profile, fit

    endpoint = endpoint_of(status.proxy_url, "", "", ignore_eos=True, timeout=600.0)
    words, rng = vocabulary(endpoint), random.Random(seed)  # noqa: S311 - a workload, not a secret
    points = asyncio.run(_measured(endpoint, words, rng, _lengths(longest), _batches(widest), repeats))
    try:
        lines = {kind: fit([point for point in points if point.kind == kind], seed) for kind in (PREFILL, DECODE)}
    except ValueError as failure:
        raise PdctlError(
            f"{failure}: streams rarely ran concurrently", "use more --repeats, or a smaller --widest"
        ) from None
    return Profile(endpoint.model, time.strftime(_DATE), lines[PREFILL], lines[DECODE], longest, widest)


def _lengths(longest: int) -> list[int]:
    """Up to eight prompt lengths from 16 to `longest`, evenly spaced on a logarithmic scale."""
    return sorted({round(16 * (longest / 16) ** (step / 7)) for step in range(8)})


def _batches(widest: int) -> list[int]:
    found = [1]
    while found[-1] * 2 <= widest:
        found.append(found[-1] * 2)
    return sorted({*found, widest})


async def _measured(
    endpoint: Endpoint, words: Vocabulary, rng: random.Random, lengths: list[int], batches: list[int], repeats: int
) -> list[Point]:
    """Measure in random order, so that a change in the machine affects all sizes alike."""
    from pdctl.bench import Asked
    from pdctl.bench.profile import DECODE, PREFILL, Point

    contexts = [lengths[2], lengths[-1] // 2]
    jobs = [(PREFILL, length, 1) for length in lengths] + [(DECODE, c, b) for c in contexts for b in batches]
    # The largest number of tokens that any of these jobs needs.
    most = max(lengths[-1] + 1, contexts[-1] + _STEPS + 2 * batches[-1])
    jobs *= repeats
    rng.shuffle(jobs)
    await _together(endpoint, [Asked(words.prompt(lengths[0], rng), 4)])
    points = []
    for number, (kind, length, batch) in enumerate(jobs):
        if number % 10 == 0:
            console.note(f"{number} of {len(jobs)} measurements done")
        if kind == PREFILL:
            records = await _together(endpoint, [Asked(words.prompt(length, rng), 1)])
            points.append(Point(kind, length, 1, records[0].ttft))
        else:
            points += await _decoded(endpoint, words, rng, (length, batch), most)
    return points


async def _decoded(
    endpoint: Endpoint, words: Vocabulary, rng: random.Random, job: tuple[int, int], most: int
) -> list[Point]:
    """One measurement; none if the streams never ran concurrently, even with longer answers. `most`: prompt plus answer
    tokens that the service is known to accept."""
    from pdctl.bench import Asked
    from pdctl.bench.profile import DECODE, Point

    length, batch = job
    # Prompts of a batch are prefilled one after another: the first stream must last until the last one has begun.
    steps = _STEPS + 2 * batch
    for _ in range(_TRIES):
        records = await _together(endpoint, [Asked(words.prompt(length, rng), steps) for _ in range(batch)])
        if (gap := _step(records)) > 0:
            return [Point(DECODE, batch * (length + steps / 2), batch, gap)]
        steps = max(steps, min(2 * steps, most - length))
    return []


def _step(records: list[Record]) -> float:
    """Median seconds per step while all streams ran; 0 if they never ran concurrently."""
    begin, end = max(record.first_at for record in records), min(record.ended_at for record in records)
    gaps = []
    for record in records:
        at = record.first_at
        for gap in record.gaps:
            if at >= begin and at + gap <= end:
                gaps.append(gap)
            at += gap
    return statistics.median(gaps) if gaps else 0.0


async def _together(endpoint: Endpoint, asked: list[Asked]) -> list[Record]:
    """Send all requests at once. Raises PdctlError if one is not answered."""
    from pdctl.bench.client import drive

    run = await drive(endpoint, asked, [0.0] * len(asked), 0, lambda _: None)
    if run.was_interrupted:
        raise KeyboardInterrupt
    for record in run.records:
        if not record.is_good:
            raise PdctlError(
                f"a request was not answered: {record.error or 'its stream was cut off'}", "see: pdctl status"
            )
    return run.records


def _tell(found: Profile) -> None:
    rows = [
        ["prefill of a prompt of l tokens", _formula(found.prefill, ("", "l", "l^2")), *_worth(found.prefill)],
        [
            "decode step of n streams, c context tokens in total",
            _formula(found.decode, ("", "c", "n")),
            *_worth(found.decode),
        ],
    ]
    console.out(console.table(["", "MILLISECONDS", "ERROR", "P90", "POINTS"], rows))
    console.out("")
    for line in summary(found):
        console.out(line)


def _formula(line: Line, names: tuple[str, str, str]) -> str:
    parts = zip(line.coefficients, names, strict=True)
    return " + ".join(f"{value * 1000:.3g} {name}".strip() for value, name in parts if value) or "0"


def _worth(line: Line) -> list[str]:
    fitted, held_out = line.points
    if not fitted:
        return [f"{line.error:.0%}" if held_out else "-", "-", f"{held_out} predicted steps"]
    return [f"{line.error:.0%}", f"{line.error_p90:.0%}", f"{fitted} fitted, {held_out} held out"]


def summary(found: Profile) -> list[str]:
    """The expected latencies, as sentences."""
    lengths = [length for length in (128, 512, 2048, 8192) if length <= found.longest] or [found.longest]
    batches = [batch for batch in (1, 4, 16, 64) if batch < found.widest] + [found.widest]
    context = found.longest // 2
    first = ", ".join(f"{found.ttft_s(length) * 1000:.0f} ms for {length} tokens" for length in lengths)
    each = ", ".join(f"{found.tpot_s(batch, context) * 1000:.0f} ms for {batch} streams" for batch in batches)
    return [
        f"first token, by prompt length: {first}",
        f"each further token, with {context} context tokens: {each}",
    ]
