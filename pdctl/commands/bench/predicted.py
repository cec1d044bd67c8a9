"""`pdctl bench compare --simulated`: what a simulation predicts, beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pdctl import console
from pdctl.commands.bench.load import Load
from pdctl.errors import PdctlError

if TYPE_CHECKING:
    from pdctl.bench.measurements import Measurements

_FIGURES = {
    "p50_ttft_ms": "TTFT p50", "p99_ttft_ms": "TTFT p99", "p50_tpot_ms": "TPOT p50", "p99_tpot_ms": "TPOT p99",
    "p50_itl_ms": "ITL p50", "p99_itl_ms": "ITL p99", "p50_e2el_ms": "E2E p50", "p99_e2el_ms": "E2E p99",
    "request_throughput": "requests/s", "request_goodput": "goodput/s",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Beside:
    """One figure of one topology. `ratio`: predicted over measured; 0 if that is not known."""

    name: str
    measured: float
    predicted: float

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured if self.measured else 0.0


def predictions(files: Sequence[Path], load: Load, profile: Path | None) -> list[Measurements]:
    """What each topology should measure under this load. Raises PdctlError."""
    from pdctl.commands.predict.imagined import Imagined
    from pdctl.commands.predict.simulate import run

    if load.concurrency:
        raise PdctlError("--concurrency cannot be simulated", "leave it out, or leave out --simulated")
    found = []
    for file in files:
        imagined = Imagined(file=file, profile=profile)
        topology = imagined.topology()
        speed = imagined.speed(topology)
        console.note(f"predicting {file} with the speed in {speed.source}")
        found.append(run(imagined.service(topology, speed), load, load.targets).measured)
    return found


def beside(measured: Measurements, predicted: Measurements) -> list[Beside]:
    """The figures that both have."""
    found = []
    for key, name in _FIGURES.items():
        one, other = measured.get(key), predicted.get(key)
        if isinstance(one, int | float) and isinstance(other, int | float):
            found.append(Beside(name, one, other))
    return found


def table(names: Sequence[str], pairs: Sequence[tuple[Measurements, Measurements]]) -> str:
    """Measured, predicted and their ratio for each topology."""
    head = [""]
    for name in names:
        head += [name.upper(), "PREDICTED", "RATIO"]
    columns = [beside(*pair) for pair in pairs]
    rows = []
    for figures in zip(*columns, strict=True):
        row = [figures[0].name]
        for one in figures:
            row += [f"{one.measured:.4g}", f"{one.predicted:.4g}", f"{one.ratio:.2f}" if one.ratio else "-"]
        rows.append(row)
    return console.table(head, rows)
