"""Everything that needs a GPU, in one run: tests, then speed on random weights. `scripts/gpu` calls it.

    python -m benchmarks.gpu [--out out] [--minutes 8] [--only STEP ...]

Each step is a separate process with a deadline. A failed step is reported, and the next one runs. Writes OUT/gpu.json,
OUT/gpu.txt and a log for each step. Exit code 0 if every step passed, or if the machine has no GPU ("skipped").
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

REPOSITORY = Path(__file__).parent.parent.parent


@dataclass(frozen=True, slots=True)
class Step:
    """A command and its time limit in seconds."""

    name: str
    argv: tuple[str, ...]
    limit_s: float


class StepFound(TypedDict):
    """How a step went; `measured`: the JSON line that it wrote, `last`: its log's last line."""

    name: str
    ok: bool
    why: str
    seconds: float
    measured: NotRequired[dict[str, Any]]
    last: NotRequired[str]


class Found(TypedDict):
    """What gpu.json holds."""

    versions: dict[str, str]
    steps: list[StepFound]


_PYTHON = sys.executable
_PYTEST = (_PYTHON, "-m", "pytest", "-v", "--tb=short", "--maxfail=1", "--timeout=100", "-p", "no:cacheprovider")
STEPS = (
    Step("tests", (*_PYTEST, "tests/gpu/test_cuda.py"), 90),
    Step("service", (*_PYTEST, "tests/gpu/test_service.py"), 150),
    Step("speed-0.6B", (_PYTHON, "-m", "benchmarks.gpu.speed", "--shape", "0.6B", "--peer"), 120),
    Step("speed-8B", (_PYTHON, "-m", "benchmarks.gpu.speed", "--shape", "8B", "--peer"), 150),
)


def main() -> int:
    """Run the steps and write their results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", nargs="*", choices=[step.name for step in STEPS], default=[])
    options = parser.parse_args()
    if reason := _no_gpu():
        sys.stdout.write(f"skipped: {reason}\n")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.minutes * 60
    steps = [step for step in STEPS if not options.only or step.name in options.only]
    found: Found = {"versions": _versions(), "steps": [_run(step, options.out, end) for step in steps]}
    (options.out / "gpu.json").write_text(json.dumps(found, indent=2) + "\n")
    text = _summary(found)
    (options.out / "gpu.txt").write_text(text)
    sys.stdout.write(text)
    return 0 if all(step["ok"] for step in found["steps"]) else 1


def _no_gpu() -> str:
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return "" if torch.cuda.is_available() else "no CUDA device"


def _versions() -> dict[str, str]:
    import platform

    import torch
    import transformers

    return {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _run(step: Step, out: Path, end: float) -> StepFound:
    started = time.monotonic()
    left = min(step.limit_s, end - started)
    if left < 5:
        return {"name": step.name, "ok": False, "why": "no time was left", "seconds": 0.0}
    with (out / f"{step.name}.log").open("w") as log:
        try:
            done = subprocess.run(
                step.argv, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, timeout=left, check=False
            )
            why = "" if done.returncode == 0 else f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            why = f"stopped after {left:.0f} s"
    return {"name": step.name, "ok": not why, "why": why, "seconds": round(time.monotonic() - started, 1),
            "measured": _measurements(out / f"{step.name}.log"), "last": _last(out / f"{step.name}.log")}  # fmt: skip


def _measurements(log: Path) -> dict[str, Any]:
    for line in reversed(log.read_text(errors="replace").splitlines()):
        if line.startswith('{"shape"'):
            return dict(json.loads(line))
    return {}


def _last(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def _summary(found: Found) -> str:
    lines = [", ".join(f"{name} {value}" for name, value in found["versions"].items())]
    for step in found["steps"]:
        verdict = "passed" if step["ok"] else f"FAILED ({step['why']})"
        lines.append(f"{step['name']}: {verdict} in {step['seconds']:.0f} s")
        measurements = step.get("measured") or {}
        if not measurements:
            lines.append(f"  {step.get('last', '')}")
            continue
        copy, matrix = measurements["copy_gb_per_s"], measurements["matrix_tflops"]
        lines.append(f"  copy {copy} GB/s, matrix product {matrix} TFLOP/s")
        for row in measurements["decode"]:
            lines.append(f"  decode batch {row['batch']}: {row['tokens_per_s']} tokens/s, {row['step_ms']} ms a step, "
                         f"{row['of_bandwidth']:.0%} of the bandwidth's limit")  # fmt: skip
        for row in measurements["prefill"]:
            lines.append(f"  prefill {row['tokens']}: {row['tokens_per_s']} tokens/s, "
                         f"{row['of_matrix_rate']:.0%} of the matrix rate's limit")  # fmt: skip
        for row in measurements["peer"]:
            what = row.get("error") or f"{row['tokens_per_s']} tokens/s, {row['step_ms']} ms a step"
            lines.append(f"  generate_batch {row['batch']}: {what}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
