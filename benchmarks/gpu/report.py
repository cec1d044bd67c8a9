"""The results of a run on a GPU as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def summary(versions: Mapping[str, str], steps: Sequence[Mapping[str, Any]]) -> str:
    """One paragraph per step; of a step without measurements the end of its log."""
    lines = [", ".join(f"{name} {value}" for name, value in versions.items())]
    for step in steps:
        verdict = "passed" if step["ok"] else f"FAILED ({step['why']})"
        lines.append(f"{step['name']}: {verdict} in {step['seconds']:.0f} s")
        measured = step.get("measured") or {}
        lines += [f"  {line}" for line in _lines(measured)]
        if not measured or not step["ok"]:
            lines += [f"  | {line}" for line in step.get("last", [])]
    return "\n".join(lines) + "\n"


def _lines(measured: Mapping[str, Any]) -> Iterator[str]:
    if "transfer" in measured:
        yield from _transfer(measured)
    elif "shape" in measured:
        yield from _speed(measured)
    else:
        for backend in measured.get("attention", []):
            yield from _backend(backend)


def _backend(found: Mapping[str, Any]) -> Iterator[str]:
    if "missing" in found:
        yield f"{found['backend']}: not here: {found['missing']}"
        return
    refuses, differs = found["refuses"], found["differs"]
    yield (
        f"{found['backend']}: agrees with gather in {found['agrees']} combinations, refuses {len(refuses)}, "
        f"DIFFERS in {len(differs)}"
    )
    for kind, why in [*differs.items()][:5]:
        yield f"  differs: {kind}: {why}"
    speed = found["speed"]
    if "error" in speed:
        yield f"  speed: {speed['error']}"
        return
    for kind, row in speed.items():
        copy = "of_copy" in row
        part = f"{row['of_copy']:.0%} of a copy" if copy else f"{row['of_matrix_rate']:.0%} of the matrix rate"
        yield f"  {kind}: {row['us']} us, {part}"


def _transfer(found: Mapping[str, Any]) -> Iterator[str]:
    if "error" in found:
        yield f"{found['transfer']}: {found['error']}"
    for kind in ("whole", "runs", "blocks"):
        if row := found.get(kind):
            yield f"{found['transfer']}, {kind}: {row['gb_per_s']} GB/s, {row['of_copy']:.0%} of a copy"


def _speed(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"attention {found['attention']}; graphs: {found['graphs']}; self-check {found['self_check']}"
    yield f"copy {found['copy_gb_per_s']} GB/s, matrix product {found['matrix_tflops']} TFLOP/s"
    for kind in ("decode_eager", "decode", "decode_ahead"):
        for row in found[kind]:
            part = f", {row['of_bandwidth']:.0%} of the bandwidth's limit" if "of_bandwidth" in row else ""
            part += f", Python {row['python_share']:.0%} of a step" if "python_share" in row else ""
            yield f"{kind} batch {row['batch']}: {_rate(row)}{part}"
    for row in found["prefill"]:
        part = f", {row['of_matrix_rate']:.0%} of the matrix rate's limit" if "of_matrix_rate" in row else ""
        yield f"prefill {row['tokens']}: {_rate(row)}{part}"
    for row in found["peer"]:
        ours: Mapping[str, Any] = next((one for one in found["decode"] if one["batch"] == row["batch"]), {})
        both = "tokens_per_s" in row and "tokens_per_s" in ours
        times = f", ours {ours['tokens_per_s'] / row['tokens_per_s']:.2f} times" if both else ""
        yield f"generate_batch {row['batch']}: {_rate(row)}{times}"


def _rate(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return f"FAILED: {row['error']}"
    took = f", {row['step_ms']} ms a step" if "step_ms" in row else ""
    return f"{row['tokens_per_s']} tokens/s{took}"
