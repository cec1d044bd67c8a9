"""See scripts/try-takeover."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.marked_model import make, template
from tests.service import Run, Service, running, temporary_run, topology
from tests.takeover.kills import Outcome, kill_again_and_again, part_of, supervisor_descriptors
from tests.takeover.plants import PLANTS, planted

_SAMPLE = "tiny-qwen3-r1"
# Connections between the supervisor and its processes come and go.
_SPARE = 8


@contextmanager
def serving(run: Run, model: Path, extra: str = "takeover = true", decodes: int = 1) -> Iterator[Service]:
    """A service whose model speaks in tool calls."""
    marked = make(model, run.folder / "marked", template("hermes"))
    # On every CPU the same answers.
    text = topology(model=str(marked), engine_extra='dtype = "float32"', extra=extra, decodes=decodes)
    with running(run, text.replace("[supervisor]", "[supervisor]\nmax_restarts = 1000")) as service:
        yield service


def checks(service: Service, outcome: Outcome, descriptors: int) -> list[tuple[str, bool]]:
    """What must hold after a run whose clients are gone."""
    assert outcome.clients is not None
    tally = outcome.clients.tally
    service.idle()
    deadline = time.monotonic() + 60
    while supervisor_descriptors(service) > descriptors + _SPARE and time.monotonic() < deadline:
        time.sleep(0.1)
    left = supervisor_descriptors(service) - descriptors
    takeover = service.process("proxy").takeover
    assert takeover is not None
    taken = [json.loads(line) for line in service.run.cli("events").stdout.splitlines() if '"took_over"' in line]
    resumed = sum(entry["resumed"] for entry in taken)
    return [
        (f"{tally.answers} answers, {tally.bytes} bytes, {tally.cut} cut", tally.cut == 0 and tally.answers > 0),
        (f"{tally.wrong} with a wrong, missing or doubled byte", tally.wrong == 0),
        (f"{resumed} streams continued in the middle", resumed > 0),
        ("every lease and block is free", True),
        (f"{left} descriptors more in the supervisor", left <= _SPARE),
        (f"{takeover.kept} connections kept: those of the supervisor itself", takeover.kept <= _SPARE),
    ]


def starts_of(service: Service) -> list[float]:
    """Seconds from each start of the proxy to its readiness."""
    events = (json.loads(line) for line in service.run.cli("events").stdout.splitlines())
    return [entry["after_s"] for entry in events if entry["event"] == "ready" and entry["process"] == "proxy"]


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=0)
    parser.add_argument("--every", type=float, default=1.0, help="mean time that a proxy lives, seconds")
    parser.add_argument("--plant", choices=sorted(PLANTS), default="")
    parser.add_argument("--model", type=Path, default=Path.home() / ".cache/pdctl/models" / _SAMPLE)
    found = parser.parse_args()
    with planted(found.plant), temporary_run() as run, serving(run, found.model) as service:
        descriptors = supervisor_descriptors(service)
        work = kill_again_and_again(
            service, found.kills, found.clients, with_chats=True, pairs=found.pairs, every_s=found.every
        )
        outcome = asyncio.run(work)
        held = checks(service, outcome, descriptors)
        starts = starts_of(service)
    held.append((f"{outcome.kills} kills, {outcome.engine_kills} of them with an engine", outcome.kills == found.kills))
    assert outcome.clients is not None
    for said in outcome.clients.tally.said:
        print(said)
    print(f"answers by kind of client: {outcome.clients.tally.kinds}")
    for what, pauses in (("the proxy died", outcome.pauses), ("an engine, too", outcome.with_engine)):
        quantiles = ", ".join(f"p{part} {part_of(pauses, part / 100):.2f} s" for part in (50, 90, 99))
        print(f"{len(pauses)} pauses of fast streams, {what}: {quantiles}")
    print(f"from a proxy's start to ready: p50 {part_of(starts, 0.5):.2f} s, p99 {part_of(starts, 0.99):.2f} s")
    for what, is_true in held:
        print("held  " if is_true else "BROKEN", what)
    print(f"{sum(is_true for _, is_true in held)} of {len(held)} checks held")
    return 0 if all(is_true for _, is_true in held) else 1


if __name__ == "__main__":
    sys.exit(main())
