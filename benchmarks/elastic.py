"""Roles that follow the load against every fixed split, in virtual time, on a load that turns.

    python -m benchmarks.elastic [--traces ../shared/traces] [--phase 300] [--engines 3]

Azure's conversation trace, then its code trace, then conversation again, each for `--phase` seconds and with its own
bursts. The shipped router, admission, schedulers and controller run in virtual time; a step takes what it takes
Gemma 3 270M on one CPU core (docs/examples/profiles). Goodput: the part of the requests within TTFT and TPOT targets.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pdctl.bench import Record
from pdctl.bench.trace import read_rows
from pdctl.simulation.engines.profiles import read_speed
from pdctl.simulation.service import Service
from pdctl.simulation.spec import Arrival, ElasticSpec, EngineSpec, ServiceSpec

ROOT = Path(__file__).parent.parent
PROFILE = ROOT / "docs/examples/profiles/gemma-270m-cpu.json"
TTFT_S, TPOT_S = 1.5, 0.3
LENGTH, LONGEST = 0.15, 900


def phase(path: Path, begin: float, seconds: float, rate: float, skip: int) -> list[Arrival]:
    """Requests of a trace at this mean rate, with the trace's own bursts."""
    rows = read_rows(path)[skip : skip + round(rate * seconds)]
    first, last = rows[0].at, rows[-1].at
    stretch = seconds / max(1e-9, last - first)
    found = []
    for row in rows:
        inputs, outputs = max(1, round(row.inputs * LENGTH)), max(1, round(row.outputs * LENGTH))
        outputs = min(outputs, LONGEST // 2)
        found.append(Arrival(begin + (row.at - first) * stretch, min(inputs, LONGEST - outputs), outputs))
    return found


def fleet(roles: Sequence[str], elastic: bool, inline: bool) -> ServiceSpec:
    times = read_speed(PROFILE).times
    engines = tuple(
        EngineSpec(f"{role}-{at}", role, times, 4000, inline_prefill=inline) for at, role in enumerate(roles)
    )
    return ServiceSpec(engines, TTFT_S, TPOT_S, elastic=ElasticSpec() if elastic else None)


def is_good(record: Record) -> bool:
    gaps = record.gaps
    return record.is_good and record.ttft <= TTFT_S and (not gaps or sum(gaps) / len(gaps) <= TPOT_S)


def goodput(spec: ServiceSpec, load: Sequence[Arrival], seed: int) -> tuple[float, int]:
    """The part of the requests within the targets, and the changes of roles."""
    service = Service(replace(spec, costs=replace(spec.costs, jitter=0.1)), seed)
    records = service.run(load)
    service.audit()
    changes = len(service.elastic.changes) if service.elastic is not None else 0
    return sum(map(is_good, records)) / len(records), changes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=ROOT.parent / "shared" / "traces")
    parser.add_argument("--phase", type=float, default=300.0)
    parser.add_argument("--engines", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--conversation", type=float, default=1.0, help="requests per second, for three engines")
    parser.add_argument("--code", type=float, default=1.0)
    arguments = parser.parse_args()
    conversation = arguments.traces / "azure_llm_2023_conv.csv"
    code = arguments.traces / "azure_llm_2023_code.csv"
    share, seconds = arguments.engines / 3, arguments.phase
    load = [
        *phase(conversation, 0.0, seconds, arguments.conversation * share, 0),
        *phase(code, seconds, seconds, arguments.code * share, 0),
        *phase(conversation, 2 * seconds, seconds, arguments.conversation * share, 2000),
    ]
    print(f"{len(load)} requests in {3 * seconds:.0f} s, {arguments.engines} engines, targets {TTFT_S}, {TPOT_S} s")
    for inline in (False, True):
        found = []
        for roles in itertools.combinations_with_replacement(("prefill", "decode", "hybrid"), arguments.engines):
            if {"prefill", "hybrid"} & set(roles) and {"decode", "hybrid"} & set(roles):
                runs = [goodput(fleet(roles, False, inline), load, seed) for seed in range(arguments.seeds)]
                found.append((statistics.mean(part for part, _ in runs), " ".join(roles)))
        found.sort(reverse=True)
        start = ("prefill", *["decode"] * (arguments.engines - 2), "hybrid")
        runs = [goodput(fleet(start, True, inline), load, seed) for seed in range(arguments.seeds)]
        acting, changes = statistics.mean(part for part, _ in runs), statistics.mean(count for _, count in runs)
        print(f"\ninline prefill {'on' if inline else 'off'}")
        part = acting / found[0][0]
        print(f"  act, from {' '.join(start)}: {acting:.1%}, {changes:.0f} changes; {part:.2f} of the best")
        for reached, name in found:
            print(f"  {name}: {reached:.1%}")


if __name__ == "__main__":
    main()
