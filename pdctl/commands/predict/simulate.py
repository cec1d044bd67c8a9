"""`pdctl simulate`: what a service would measure under a load, without running it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pdctl import console
from pdctl.commands.bench.keep import draw, drawing, write
from pdctl.commands.bench.load import Traffic, takes
from pdctl.commands.common import given_options
from pdctl.commands.predict.imagined import Imagined, arrivals, traffic_of
from pdctl.errors import PdctlError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pdctl.bench.measurements import Targets
    from pdctl.simulation.report import EngineUse, Prediction
    from pdctl.simulation.spec import ServiceSpec

# More engines are summed up by role.
_MOST_ROWS = 24


@takes(traffic=Traffic, imagined=Imagined)
def simulate(
    context: typer.Context,
    traffic: Traffic,
    imagined: Imagined,
    trace: Path | None = typer.Option(
        None, "--trace", help="Request trace (Azure CSV or Mooncake JSONL): short for --workload trace --data."
    ),
    engine: list[str] = typer.Option(
        [], "--engine",
        help="ROLE[:COUNT][@SPEED] instead of the topology's engines, such as decode:2@0.5 (half as fast) or "
        "hybrid@gpu.json (of another profile). Repeatable.",
    ),
    routing: str = typer.Option("", "--routing", help="Routing policy. Default: as in the topology."),
    ttft_ms: float = typer.Option(0.0, "--ttft-ms", min=0.0, help="Target for the first token. Default: topology's."),
    tpot_ms: float = typer.Option(0.0, "--tpot-ms", min=0.0, help="Target for each later token. Default: topology's."),
    out: Path | None = typer.Option(None, "--out", help="Write the result to this JSON file, as bench serve does."),
    page: Path | None = typer.Option(None, "--html", help="Write an HTML page with plots to this file."),
    pictures: Path | None = typer.Option(None, "--png", help="Write plots as PNG files into this folder."),
    as_json: bool = typer.Option(False, "--json", help="Print the result as JSON on stdout."),
) -> None:  # fmt: skip
    """Predict what a service would measure under a load. The shipped router, admission, scheduler and failover run in
    virtual time; how long a step takes comes from a profile. Nothing is started."""
    traffic = traffic_of(traffic, trace)
    traffic.check(given_options(context))
    if pictures is not None:
        drawing()
    spec = _service(imagined, engine, routing, ttft_ms, tpot_ms)
    found = run(spec, traffic, targets_of(spec, traffic))
    told = found.to_dict()
    console.out(json.dumps(told) if as_json else "\n".join(_text(found, targets_of(spec, traffic))))
    _keep(found, out, page, pictures)


def run(spec: ServiceSpec, traffic: Traffic, targets: Targets) -> Prediction:
    """Simulate a service under a load. Raises PdctlError."""
    from pdctl.simulation.report import predict
    from pdctl.simulation.service import Service

    service = Service(spec, traffic.seed)
    records = service.run(*arrivals(traffic))
    service.audit()
    return predict(service, records, targets)


def targets_of(spec: ServiceSpec, traffic: Traffic) -> Targets:
    """The goodput targets: those that are given, else the service's."""
    from pdctl.bench.measurements import Targets

    return traffic.targets if traffic.targets.are_any else Targets(spec.ttft_s * 1000, spec.tpot_s * 1000)


def _service(imagined: Imagined, engines: Sequence[str], routing: str, ttft_ms: float, tpot_ms: float) -> ServiceSpec:
    from pdctl.simulation.engines.fleets import checked, of_wishes, parse_wish
    from pdctl.simulation.engines.profiles import read_speed

    topology = imagined.topology()
    speed = imagined.speed(topology)
    console.note(f"speed of the engines: {speed.source}")
    spec = imagined.service(topology, speed)
    wishes = []
    for wish in map(parse_wish, engines):
        try:
            factor = float(wish.speed or 1.0)
        except ValueError:
            wishes.append((wish, read_speed(Path(wish.speed))))
            continue
        if factor <= 0:
            raise PdctlError(f"--engine {wish.role}@{wish.speed}: a speed must be greater than 0")
        wishes.append((wish, speed.scaled(factor)))
    if wishes:
        spec = replace(spec, engines=of_wishes(wishes, spec.engines[0]))
    if routing:
        spec = replace(spec, routing=_known_routing(routing))
    return checked(replace(spec, ttft_s=ttft_ms / 1000 or spec.ttft_s, tpot_s=tpot_ms / 1000 or spec.tpot_s))


def _known_routing(name: str) -> str:
    from pdctl.topology.schema import ROUTINGS

    if name not in ROUTINGS:
        raise PdctlError(f"--routing {name!r} is not a policy", f"policies: {', '.join(ROUTINGS)}")
    return name


def _text(found: Prediction, targets: Targets) -> list[str]:
    from pdctl.bench.measurements import QUANTILES
    from pdctl.bench.report import page

    lines = [page.text(found.measured, targets, QUANTILES, is_predicted=True), "", engines_table(found.engines), ""]
    if found.inline is not None:
        reasons = ", ".join(f"{count} {why}" for why, count in found.placed.items() if why != "remote")
        lines.append(f"{found.inline:.1%} of the requests computed inline" + (f" ({reasons})" if reasons else ""))
    if found.failed_tries:
        lines.append(f"{found.failed_tries} calls failed and were made again")
    lines += [f"at {change.at:.0f} s {change.engine} to {change.role}" for change in found.role_changes[:_MOST_ROWS]]
    errors: dict[str, int] = {}
    for record in found.records:
        if record.error:
            errors[record.error] = errors.get(record.error, 0) + 1
    lines += [
        f"failed: {error} ({count} times)" for error, count in sorted(errors.items(), key=lambda item: -item[1])[:5]
    ]
    return lines


def engines_table(engines: Sequence[EngineUse]) -> str:
    """One row per engine, or per role if there are many."""
    names = ["ENGINE", "ROLE", "BUSY", "STEPS", "KV PEAK", "PROMPTS", "ANSWERS", "STARTS"]
    if len(engines) <= _MOST_ROWS:
        return console.table(names, [_row(one.name, [one]) for one in engines])
    roles = sorted({one.role for one in engines})
    by_role = {role: [one for one in engines if one.role == role] for role in roles}
    return console.table(names, [_row(f"{len(those)} engines", those) for those in by_role.values()])


def _row(name: str, those: Sequence[EngineUse]) -> list[str]:
    busy = sum(one.busy for one in those) / len(those)
    peak = max(one.kv_peak for one in those)
    sums = [sum(getattr(one, what) for one in those) for what in ("prefills", "decodes", "lives")]
    steps = sum(one.steps for one in those)
    return [name, those[0].role, f"{busy:.0%}", f"{steps}", f"{peak:.0%}", *map(str, sums)]


def _keep(found: Prediction, out: Path | None, page: Path | None, pictures: Path | None) -> None:
    from pdctl.bench.measurements import QUANTILES
    from pdctl.bench.report import page as report

    if out is not None:
        write(out, json.dumps(found.to_dict()))
    if page is not None:
        write(page, report.page(found.measured, "pdctl simulate", QUANTILES, "predicted, not measured"))
    if pictures is not None:
        draw(pictures, {"": found.measured})
