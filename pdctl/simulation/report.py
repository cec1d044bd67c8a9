"""What a simulation predicts, in the form in which `pdctl bench` tells what it has measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pdctl.bench import Record
from pdctl.bench.client import Run
from pdctl.bench.measurements import Measurements, Targets, measurements
from pdctl.simulation.elastic import RoleChange
from pdctl.simulation.service import Service


@dataclass(frozen=True, slots=True)
class EngineUse:
    """One engine. `busy`: the part of the time in which it computed; `kv_peak`: the largest part of its KV that was
    seen in use; `prefills` and `decodes`: answered requests whose prompt, or answer, it computed; `lives`: starts."""

    name: str
    role: str
    busy: float
    steps: int
    kv_peak: float
    prefills: int
    decodes: int
    lives: int


@dataclass(frozen=True, slots=True)
class Prediction:
    """`inline`: the part of the requests that a decode engine computed alone although a pair could, None if there was
    no choice; `placed`: their number by reason; `failed_tries`: calls that failed and were made again elsewhere;
    `role_changes`: of the controller."""

    measured: Measurements
    records: list[Record]
    engines: list[EngineUse]
    inline: float | None
    placed: dict[str, int]
    failed_tries: int
    moved_bytes: int
    role_changes: list[RoleChange]

    def to_dict(self) -> dict[str, object]:
        """The measurements, and what only a simulation knows, as JSON."""
        found = {
            "engines": [asdict(engine) for engine in self.engines],
            "inline": self.inline,
            "placed": self.placed,
            "failed_tries": self.failed_tries,
            "moved_bytes": self.moved_bytes,
            "role_changes": [asdict(change) for change in self.role_changes],
        }
        return {**self.measured, "simulation": found}


def predict(service: Service, records: Sequence[Record], targets: Targets) -> Prediction:
    """What a service that has run says about its load."""
    begin = min((record.planned_at for record in records), default=0.0)
    end = max((record.ended_at for record in records), default=0.0)
    run = Run(list(records), begin, end, _most_at_once(records))
    seconds = max(1e-9, end - begin)
    good = [record.engines for record in records if record.is_good]
    uses = [
        EngineUse(
            node.name, node.spec.role, node.busy_s / seconds, node.steps, node.kv_peak,
            sum(engines["prefill"] == node.name for engines in good),
            sum(engines["decode"] == node.name for engines in good), node.life,
        )
        for node, _ in service.places.values()
    ]  # fmt: skip
    placed, chosen = dict(sorted(service.placed.items())), service.placed.total()
    inline = 1 - service.placed["remote"] / chosen if chosen else None
    found = measurements(run, targets)
    changes = service.elastic.changes if service.elastic is not None else []
    return Prediction(found, run.records, uses, inline, placed, service.failures, service.wires.moved, changes)


def _most_at_once(records: Sequence[Record]) -> int:
    changes = sorted([(r.sent_at, 1) for r in records] + [(r.ended_at, -1) for r in records])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
