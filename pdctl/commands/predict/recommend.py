"""`pdctl recommend`: which engines to run for a load, by simulation."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pdctl import console
from pdctl.commands.bench.keep import drawing, keep_curves, write
from pdctl.commands.bench.load import Traffic, Workload, takes
from pdctl.commands.common import given_options
from pdctl.commands.predict.imagined import Imagined, arrivals, traffic_of
from pdctl.errors import PdctlError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pdctl.bench.measurements import Targets
    from pdctl.bench.report.observations import Curves
    from pdctl.simulation.advice import Advice, Outcome
    from pdctl.simulation.spec import Arrival, ServiceSpec
    from pdctl.topology.spec import Topology

# Of the load: at these the best setups are compared in the plot.
_LOADS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
_DRAWN = 3


@dataclass(frozen=True, slots=True)
class Sample(Traffic):
    """The load that engines are chosen for."""

    count: Annotated[
        int, typer.Option("-n", "--requests", min=20, help="Number of requests; of a trace: at most this many.")
    ] = 400


@takes(traffic=Sample, imagined=Imagined)
def recommend(
    context: typer.Context,
    traffic: Sample,
    imagined: Imagined,
    trace: Path | None = typer.Option(
        None, "--trace", help="Request trace (Azure CSV or Mooncake JSONL): short for --workload trace --data."
    ),
    engines: int = typer.Option(0, "--engines", min=0, help="Number of engines. Default: the topology's."),
    ttft_ms: float = typer.Option(0.0, "--ttft-ms", min=0.0, help="Target for the first token. Default: topology's."),
    tpot_ms: float = typer.Option(0.0, "--tpot-ms", min=0.0, help="Target for each later token. Default: topology's."),
    seeds: int = typer.Option(3, "--seeds", min=1, max=30, help="How often the best setups are simulated."),
    out: Path | None = typer.Option(None, "--out", help="Write the recommended topology to this file."),
    page: Path | None = typer.Option(None, "--html", help="Write an HTML page with plots to this file."),
    pictures: Path | None = typer.Option(None, "--png", help="Write plots as PNG files into this folder."),
    as_json: bool = typer.Option(False, "--json", help="Print the result as JSON on stdout."),
) -> None:
    """Find the roles, counts, chunk size and policy that keep the targets for most requests of a load, or say that
    prefill and decode should not be separated. Everything is simulated; nothing is started."""
    from pdctl.simulation.advice import advise

    wanted = traffic_of(traffic, trace)
    wanted.check(given_options(context))
    if wanted.workload is not Workload.TRACE and math.isinf(wanted.rate):
        raise PdctlError("a load needs a rate", "give --rate, or --trace FILE")
    if wanted.warm_up:
        raise PdctlError("--warm-up does nothing here", "leave it out")
    if pictures is not None:
        drawing()
    topology = imagined.topology()
    base = _base(topology, imagined, ttft_ms, tpot_ms)
    loads = [arrivals(replace(wanted, seed=wanted.seed + number))[0] for number in range(seeds)]
    targets = _targets(base, wanted)
    found = advise(base, engines or len(base.engines), loads, targets, console.note)
    console.out(json.dumps(_as_json(found), indent=2) if as_json else _text(found, targets))
    if out is not None:
        write(out, topology_text(found.best, topology, base))
        _check(out)
    if page is not None or pictures is not None:
        curves = _curves(found, base, loads[0], targets)
        keep_curves(
            curves, "pdctl recommend", found.verdict(), _table(found), page, pictures, "predicted, not measured"
        )


def _base(topology: Topology, imagined: Imagined, ttft_ms: float, tpot_ms: float) -> ServiceSpec:
    speed = imagined.speed(topology)
    console.note(f"speed of the engines: {speed.source}")
    spec = imagined.service(topology, speed)
    if spec.faults:
        raise PdctlError("--kill does nothing here", "see what deaths cost with: pdctl simulate --kill")
    return replace(spec, ttft_s=ttft_ms / 1000 or spec.ttft_s, tpot_s=tpot_ms / 1000 or spec.tpot_s)


def _targets(base: ServiceSpec, traffic: Traffic) -> Targets:
    from pdctl.bench.measurements import Targets

    return traffic.targets if traffic.targets.are_any else Targets(base.ttft_s * 1000, base.tpot_s * 1000)


# -- what it says ------------------------------------------------------------------------------------------


def _table(found: Advice) -> tuple[list[str], list[list[str]]]:
    names = [
        "SETUP",
        "TTFT P50",
        "P99",
        "TPOT P50",
        "P99",
        "IN TARGET",
        "GOODPUT/S",
        "95%",
        "MORE THAN THE RECOMMENDED, 95%",
    ]
    return names, [_row(found, one) for one in found.finalists]


def _row(found: Advice, one: Outcome) -> list[str]:
    goodput, gain = found.goodput(one), found.gain(one, found.best)
    apart = "-" if one is found.best else f"{gain.low:+.3g} to {gain.high:+.3g}"
    latencies = [f"{value:.0f}" for value in (one.ttft_p50, one.ttft_p99, one.tpot_p50, one.tpot_p99)]
    interval = f"{goodput.low:.3g} to {goodput.high:.3g}"
    return [str(one.setup), *latencies, f"{one.attained:.1%}", f"{goodput.value:.3g}", interval, apart]


def _text(found: Advice, targets: Targets) -> str:
    limits = [f"{name} {limit:g} ms" for name, limit in asdict(targets).items() if limit is not None]
    lines = [
        f"{found.tried} setups tried; targets: {', '.join(limits)}; times in ms", "", console.table(*_table(found)), "",
        f"recommended: {found.best.setup}", console.paint(found.verdict(), "bold", sys.stdout),
    ]  # fmt: skip
    return "\n".join(lines)


def _as_json(found: Advice) -> dict[str, object]:
    def told(one: Outcome) -> dict[str, object]:
        apart = asdict(found.gain(one, found.best))
        latencies = {name: getattr(one, name) for name in ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99")}
        return {
            **asdict(one.setup), **latencies, "attained": one.attained, "goodput": asdict(found.goodput(one)),
            "more_than_best": apart, "busy": one.busy,
        }  # fmt: skip

    return {
        "schema": 1, "verdict": found.verdict(), "disaggregate": found.best.setup.is_split,
        "recommended": told(found.best), "finalists": [told(one) for one in found.finalists], "tried": found.tried,
    }  # fmt: skip


def _curves(found: Advice, base: ServiceSpec, load: Sequence[Arrival], targets: Targets) -> dict[str, Curves]:
    """The part of the requests within the targets by load: of the best setups, with and without a split."""
    from pdctl.bench.report.observations import Curves
    from pdctl.simulation.advice import outcome

    shown = list(found.finalists[:_DRAWN])
    shown += [one for one in (found.split, found.together) if one is not None and one not in shown]
    lines: dict[str, list[tuple[float, float]]] = {str(one.setup): [] for one in shown}
    for factor in _LOADS:
        faster = [replace(arrival, at=arrival.at / factor) for arrival in load]
        for one in shown:
            kept = outcome(one.setup, base, [faster], targets).attained
            lines[str(one.setup)].append((factor, 100 * kept))
            console.note(f"{factor:g} times the load: {one.setup}: {kept:.1%} within the targets")
    return {"targets": Curves("% of requests within the targets", "times the load", lines)}


# -- the topology ------------------------------------------------------------------------------------------


def topology_text(best: Outcome, topology: Topology, base: ServiceSpec) -> str:
    """A topology file with the recommended engines, otherwise like `topology`."""
    setup, like, service = best.setup, topology.engines[0], topology.service
    counts = (("prefill", setup.prefills), ("decode", setup.decodes), ("hybrid", setup.hybrids))
    cpus = list(dict.fromkeys(cpu for group in topology.engines for cpu in group.cpus))
    parts = [
        "# Recommended by `pdctl recommend`: predicted, not measured. Measure it with: pdctl bench compare",
        f'[service]\nname = "{service.name}"\nmodel = "{service.model}"\nmax_model_len = {service.max_model_len}',
        f'[proxy]\nhost = "{topology.proxy.host}"\nport = {topology.proxy.port}\nrouting = "{base.routing}"\n'
        f'admission = "{base.admission}"',
        f"[slo]\nttft_ms = {base.ttft_s * 1000:g}\ntpot_ms = {base.tpot_s * 1000:g}",
    ]  # fmt: skip
    total = setup.prefills + setup.decodes + setup.hybrids
    for role, count in counts:
        if not count:
            continue
        keys = [f'name = "{role}"', f'role = "{role}"', f"replicas = {count}", f'device = "{like.device.value}"']
        if cpus and len(cpus) % total == 0:
            share = len(cpus) // total * count
            keys.append(f"cpus = {cpus[:share]}")
            cpus = cpus[share:] + cpus[:share]
        if "kv_cache_gb" in like.given or not like.kv_share:
            keys.append(f"kv_cache_gb = {like.kv_cache_gb:g}")
        keys += [
            f"block_size = {like.block_size}", f"max_num_seqs = {like.max_num_seqs}",
            f"max_num_batched_tokens = {setup.chunk}", f'policy = "{setup.policy}"',
            f"inline_prefill = {str(setup.inline).lower()}",
        ]  # fmt: skip
        parts.append("[[engines]]\n" + "\n".join(keys))
    return "\n\n".join(parts) + "\n"


def _check(path: Path) -> None:
    """The file must be usable, whatever was recommended. Raises ConfigError."""
    from pdctl.topology.loader import load_imagined

    load_imagined(path)
