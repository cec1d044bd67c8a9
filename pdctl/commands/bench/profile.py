"""`pdctl bench profile`: measures a running service and keeps its latency model, which `pdctl plan` then tells by."""

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
from pdctl.commands.bench.load import endpoint_of, vocabulary
from pdctl.commands.common import STATE, FileOption, JsonOption, ServiceOption, call, find_service
from pdctl.errors import PdctlError

if TYPE_CHECKING:
    from pdctl.bench import Asked, Record
    from pdctl.bench.client import Endpoint
    from pdctl.bench.profile import Line, Point, Profile
    from pdctl.bench.workload import Vocabulary

_STEPS = 24
# For streams that end before the last of their batch has begun.
_TRIES = 4


def profile(
    longest: int = typer.Option(512, "--longest", min=64, help="Tokens of the longest prompt."),
    widest: int = typer.Option(8, "--widest", min=2, max=256, help="The most streams at once."),
    repeats: int = typer.Option(3, "--repeats", min=2, max=20, help="Measurements of each kind and size."),
    out: Path | None = typer.Option(None, "--out", help="Default: in the service's state folder, where plan looks."),
    seed: int = typer.Option(0, "--seed", help="The same seed asks the same."),
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
    as_json: bool = JsonOption,
) -> None:
    """Measure how long prefills and decode steps of the running service take, fit its latency model, and keep it. The
    service should have nothing else to do."""
    from pdctl.bench.profile import DECODE, PREFILL, Profile, fit, path_of, save
    from pdctl.host.users import state_root

    name = find_service(service, file)
    status = call(name, "GET", STATE)
    endpoint = endpoint_of(str(status["proxy_url"]), "", "", ignore_eos=True, timeout=600.0)
    words, rng = vocabulary(endpoint), random.Random(seed)  # noqa: S311 - a workload, not a secret
    points = asyncio.run(_measured(endpoint, words, rng, _lengths(longest), _batches(widest), repeats))
    try:
        lines = {kind: fit([point for point in points if point.kind == kind], seed) for kind in (PREFILL, DECODE)}
    except ValueError as failure:
        raise PdctlError(f"{failure}: streams seldom ran together", "more --repeats, or a smaller --widest") from None
    found = Profile(endpoint.model, time.strftime("%Y-%m-%d %H:%M"), lines[PREFILL], lines[DECODE], longest, widest)
    target = out or path_of(state_root(), name)
    try:
        save(target, found)
    except OSError as failure:
        raise PdctlError(f"{target} cannot be written: {failure.strerror}") from None
    if as_json:
        console.out(json.dumps({"schema": 1, **asdict(found)}, indent=2))
    else:
        _tell(found)
    console.note(f"kept in {target}")


def _lengths(longest: int) -> list[int]:
    """Eight, evenly spread in their logarithm from 16 on."""
    return sorted({round(16 * (longest / 16) ** (step / 7)) for step in range(8)})


def _batches(widest: int) -> list[int]:
    found = [1]
    while found[-1] * 2 <= widest:
        found.append(found[-1] * 2)
    return sorted({*found, widest})


async def _measured(
    endpoint: Endpoint, words: Vocabulary, rng: random.Random, lengths: list[int], batches: list[int], repeats: int
) -> list[Point]:
    """In random order, so that a machine that changes meanwhile changes all of them."""
    from pdctl.bench import Asked
    from pdctl.bench.profile import DECODE, PREFILL, Point

    contexts = [lengths[2], lengths[-1] // 2]
    jobs = [(PREFILL, length, 1) for length in lengths] + [(DECODE, c, b) for c in contexts for b in batches]
    # What one of these needs in any case.
    most = max(lengths[-1] + 1, contexts[-1] + _STEPS + 2 * batches[-1])
    jobs *= repeats
    rng.shuffle(jobs)
    await _together(endpoint, [Asked(words.prompt(lengths[0], rng), 4)])
    points = []
    for number, (kind, length, batch) in enumerate(jobs):
        if number % 10 == 0:
            console.note(f"{number} of {len(jobs)} measurements")
        if kind == PREFILL:
            records = await _together(endpoint, [Asked(words.prompt(length, rng), 1)])
            points.append(Point(kind, length, 1, records[0].ttft))
        else:
            points += await _decoded(endpoint, words, rng, (length, batch), most)
    return points


async def _decoded(
    endpoint: Endpoint, words: Vocabulary, rng: random.Random, job: tuple[int, int], most: int
) -> list[Point]:
    """One measurement; none where streams never ran together, though answers were made longer. `most`: tokens of prompt
    and answer that the service is known to take."""
    from pdctl.bench import Asked
    from pdctl.bench.profile import DECODE, Point

    length, batch = job
    # Prompts of a batch are computed one after another: the first stream must last until the last one has begun.
    steps = _STEPS + 2 * batch
    for _ in range(_TRIES):
        records = await _together(endpoint, [Asked(words.prompt(length, rng), steps) for _ in range(batch)])
        if (gap := _step(records)) > 0:
            return [Point(DECODE, batch * (length + steps / 2), batch, gap)]
        steps = max(steps, min(2 * steps, most - length))
    return []


def _step(records: list[Record]) -> float:
    """Seconds a step took while all streams ran; 0 where they never did together."""
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
    """Raises PdctlError where one is not answered."""
    from pdctl.bench.client import drive

    run = await drive(endpoint, asked, [0.0] * len(asked), 0, lambda _: None)
    if run.was_interrupted:
        raise KeyboardInterrupt
    for record in run.records:
        if not record.is_good:
            raise PdctlError(f"a request was not answered: {record.error or 'its stream broke off'}", "pdctl status")
    return run.records


def _tell(found: Profile) -> None:
    rows = [
        ["prefill of a prompt of l tokens", _formula(found.prefill, ("", "l", "l^2")), *_worth(found.prefill)],
        ["decode step of n streams, c tokens in all", _formula(found.decode, ("", "c", "n")), *_worth(found.decode)],
    ]
    console.out(console.table(["", "MILLISECONDS", "ERROR", "P90", "POINTS"], rows))
    console.out("")
    for line in summary(found):
        console.out(line)


def _formula(line: Line, names: tuple[str, str, str]) -> str:
    parts = zip(line.coefficients, names, strict=True)
    return " + ".join(f"{value * 1000:.3g} {name}".strip() for value, name in parts if value) or "0"


def _worth(line: Line) -> list[str]:
    return [f"{line.error:.0%}", f"{line.error_p90:.0%}", f"{line.points[0]} fitted, {line.points[1]} held out"]


def summary(found: Profile) -> list[str]:
    """What to expect, in words."""
    lengths = [length for length in (128, 512, 2048, 8192) if length <= found.longest] or [found.longest]
    batches = [batch for batch in (1, 4, 16, 64) if batch < found.widest] + [found.widest]
    context = found.longest // 2
    first = ", ".join(f"{found.ttft_s(length) * 1000:.0f} ms of {length} tokens" for length in lengths)
    each = ", ".join(f"{found.tpot_s(batch, context) * 1000:.0f} ms of {batch} streams" for batch in batches)
    return [
        f"first token of a prompt: {first}",
        f"each further token, with {context} tokens of context: {each}",
    ]
