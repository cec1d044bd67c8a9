"""`pdctl bench transfer`: time each transport by size and number of blocks, against a memory copy and the link."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pdctl import console
from pdctl.commands.bench.keep import drawing, keep_curves
from pdctl.errors import PdctlError, Verdict
from pdctl.transports import TRANSPORTS

if TYPE_CHECKING:
    from pdctl.bench.report.observations import Curves
    from pdctl.doctor.transfer import Result

_HEADER = ["TRANSPORT", "OVER", "MIB", "BLOCKS", "KIB EACH", "MS", "GB/S", "OF A COPY", "OF THE LINK", "64 BYTES"]
_COPY = "memory copy, block by block"


def transfer(
    only: str = typer.Option("", "--transport", help="Transport: shm, mooncake or nixl. Default: all."),
    protocol: str = typer.Option("auto", "--protocol", help="Network protocol: auto, tcp or rdma."),
    mib: list[int] = typer.Option(
        [1, 16, 64, 256], "--mib", min=1, max=16384, help="Transfer size in MiB. Repeatable."
    ),
    blocks: list[int] = typer.Option(
        [1, 16, 256, 4096],
        "--blocks",
        min=1,
        max=16384,
        help="Number of scattered blocks that each size is split into. Repeatable.",
    ),
    page: Path | None = typer.Option(None, "--html", help="Write an HTML page with plots to this file."),
    pictures: Path | None = typer.Option(None, "--png", help="Write plots as PNG files into this folder."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON on stdout."),
) -> None:
    """Time each transport by size and number of blocks, between two processes on this machine, and compare it with a
    memory copy and, over RDMA, with the link. Exit codes: 0 all bytes correct, 1 a fallback was used, 2 wrong bytes or
    no transport works."""
    from pdctl.doctor import transfer as moving
    from pdctl.host.devices.rdma import read_tree
    from pdctl.plan.interpreter import interpreter_of

    for option, value, known in (("--transport", only, TRANSPORTS), ("--protocol", protocol, moving.PROTOCOLS)):
        if value and value not in known:
            raise PdctlError(f"{option} {value!r} is unknown", f"one of: {', '.join(known)}")
    if pictures is not None:
        drawing()
    python = interpreter_of(None, "timing transfers")
    sizes, counts, tree, found = sorted(set(mib)), tuple(sorted(set(blocks))), read_tree(), []
    for name in [only] if only else [name for name, info in TRANSPORTS.items() if not info.on_gpu]:
        for size in sizes:
            console.note(f"{name}: moving {size} MiB between two processes ...")
            found.append(moving.run(moving.Probe(python, name, protocol, size, pieces=counts), tree) | {"mib": size})
    table = (_HEADER, [row for entry in found for row in _rows(entry)])
    console.out(json.dumps(found, indent=2) if as_json else console.table(*table))
    troubles = [f"{entry['transport']}, {entry['mib']} MiB: {why}" for entry in found if (why := _trouble(entry))]
    for trouble in troubles:
        console.note(trouble)
    summary = "Medians. Memory copies of the same blocks, one by one, were measured in turn with the transfers."
    keep_curves(_curves(found), "pdctl bench transfer", summary, table, page, pictures, "; ".join(troubles))
    raise Verdict(moving.exit_code(found))


def _trouble(entry: Result) -> str:
    """What is wrong with a result; "" if nothing."""
    if "error" in entry:
        return str(entry["error"])
    if not entry["bytes_right"]:
        return "WRONG: the received bytes differ from the sent ones"
    return f"FALLBACK to {entry['protocol']}: {entry['fallback']}" if entry["fallback"] else ""


def _rows(entry: Result) -> list[list[str]]:
    """One row per number of blocks. Values that do not depend on it are only in the first row."""
    if "error" in entry:
        return [[entry["transport"], "-", str(entry["mib"]), "failed", *[""] * (len(_HEADER) - 4)]]
    link = entry["link_gbps"]
    over = entry["protocol"] if entry["bytes_right"] else "WRONG"
    return [
        [
            entry["transport"], over, str(entry["mib"]), str(cut["count"]),
            f"{cut['bytes_each'] / 1024:g}", f"{cut['ms']:.2f}", f"{cut['gbps']:.3g}", f"{cut['of_copy']:.0%}",
            f"{cut['gbps'] / link:.0%}" if link else "-", "" if place else f"{entry['latency_us']:.0f} us",
        ]
        for place, cut in enumerate(entry["pieces"])
    ]  # fmt: skip


def _curves(found: list[Result]) -> dict[str, Curves]:
    """Curves by file name: over the size with the fewest blocks, and over the number of blocks at the largest size."""
    from pdctl.bench.report.observations import Curves

    works = [entry for entry in found if "error" not in entry and entry["bytes_right"]]
    largest = max((entry["mib"] for entry in works), default=0)
    by_size: dict[str, list[tuple[float, float]]] = {}
    latency: dict[str, list[tuple[float, float]]] = {}
    by_count: dict[str, list[tuple[float, float]]] = {}
    for entry in works:
        name, first_cut = f"{entry['transport']} ({entry['protocol']})", entry["pieces"][0]
        by_size.setdefault(name, []).append((entry["mib"], first_cut["gbps"]))
        latency.setdefault(name, []).append((entry["mib"], first_cut["ms"]))
        if entry["mib"] == largest:
            by_count[name] = [(cut["count"], cut["gbps"]) for cut in entry["pieces"]]
    if works:
        # The copies measured with the first transport: its library's threads disturb them least.
        first = [entry for entry in works if entry["transport"] == works[0]["transport"]]
        by_size[_COPY] = [(entry["mib"], entry["pieces"][0]["copy_gbps"]) for entry in first]
        whole = next(entry for entry in works if entry["mib"] == largest)
        by_count[_COPY] = [(cut["count"], cut["copy_gbps"]) for cut in whole["pieces"]]
    count = works[0]["pieces"][0]["count"] if works else 0
    fewest = "in one block" if count == 1 else f"in {count} blocks"
    return {
        "size": Curves(f"GB/s by size, {fewest}", "MiB", by_size),
        "latency": Curves(f"Milliseconds by size, {fewest}", "MiB", latency),
        "blocks": Curves(f"GB/s of {largest} MiB by number of blocks", "blocks", by_count),
    }
