"""Everything that needs a GPU, in one run: tests, parity of attention, transfers, then speed on random weights.
`scripts/gpu` calls it.

    python -m benchmarks.gpu [--out out] [--minutes 12] [--only STEP ...]
    python -m benchmarks.gpu --tiny --device cpu    # a trial of this program itself, without a GPU

Each step is a separate process with a deadline. A failed step is reported, and the next one runs. Writes OUT/gpu.json,
OUT/gpu.txt and a log for each step. Exit code 0 if every step passed, or if the machine has no GPU ("skipped").
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from benchmarks.gpu.report import summary

REPOSITORY = Path(__file__).parent.parent.parent


@dataclass(frozen=True, slots=True)
class Step:
    """A command and its time limit in seconds."""

    name: str
    argv: tuple[str, ...]
    limit_s: float


class StepFound(TypedDict):
    """How a step went; `measured`: the JSON line that it wrote, `last`: its log's last lines."""

    name: str
    ok: bool
    why: str
    seconds: float
    measured: NotRequired[dict[str, Any]]
    last: NotRequired[list[str]]


class Found(TypedDict):
    """What gpu.json holds."""

    versions: dict[str, str]
    steps: list[StepFound]


_PYTHON = sys.executable
_PYTEST = (_PYTHON, "-m", "pytest", "-v", "-rfEs", "--tb=short", "--timeout=100", "-p", "no:cacheprovider")
# In this order: what is quick and says most comes first.
STEPS = (
    Step("attention", (_PYTHON, "-m", "benchmarks.gpu.attention"), 100),
    Step("tests", (*_PYTEST, "tests/gpu/test_cuda.py"), 100),
    Step("transfer", (_PYTHON, "-m", "benchmarks.gpu.transfer"), 50),
    Step("speed-0.6B", (_PYTHON, "-m", "benchmarks.gpu.speed", "--shape", "0.6B", "--peer"), 120),
    Step("speed-8B", (_PYTHON, "-m", "benchmarks.gpu.speed", "--shape", "8B", "--peer"), 170),
    Step("service", (*_PYTEST, "tests/gpu/test_service.py"), 170),
)
TINY = (
    Step("attention", (_PYTHON, "-m", "benchmarks.gpu.attention", "--tiny"), 100),
    Step("transfer", (_PYTHON, "-m", "benchmarks.gpu.transfer", "--mib", "16"), 50),
    Step("speed-tiny", (_PYTHON, "-m", "benchmarks.gpu.speed", "--shape", "tiny"), 200),
)


def main() -> int:
    """Run the steps and write their results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--tiny", action="store_true", help="small sizes: whether everything runs")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="*", choices=[step.name for step in (*STEPS, *TINY)], default=[])
    options = parser.parse_args()
    if options.device == "cuda" and (reason := _no_gpu()):
        sys.stdout.write(f"skipped: {reason}\n")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.minutes * 60
    steps = [step for step in (TINY if options.tiny else STEPS) if not options.only or step.name in options.only]
    found: Found = {"versions": _versions(options.device), "steps": []}
    for step in steps:
        found["steps"].append(_run(step, options.device, options.out, end))
        # After each step: a run that is cut off leaves what it has.
        (options.out / "gpu.json").write_text(json.dumps(found, indent=2) + "\n")
        (options.out / "gpu.txt").write_text(summary(found["versions"], found["steps"]))
    sys.stdout.write(summary(found["versions"], found["steps"]))
    return 0 if all(step["ok"] for step in found["steps"]) else 1


def _no_gpu() -> str:
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return "" if torch.cuda.is_available() else "no CUDA device"


def _versions(device: str) -> dict[str, str]:
    import platform

    import torch
    import transformers

    return {
        "card": torch.cuda.get_device_name() if device == "cuda" else "none",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _run(step: Step, device: str, out: Path, end: float) -> StepFound:
    started = time.monotonic()
    left = min(step.limit_s, end - started)
    if left < 5:
        return {"name": step.name, "ok": False, "why": "no time was left", "seconds": 0.0}
    argv = step.argv if "pytest" in step.argv else (*step.argv, "--device", device)
    path = out / f"{step.name}.log"
    with path.open("w") as log:
        # A GPU's kernels are compiled once for all steps. Fragments of memory are no fault of a step.
        env = {"TRITON_CACHE_DIR": str((out / "triton").absolute()), **os.environ}
        try:
            done = subprocess.run(
                argv, cwd=REPOSITORY, env=env, stdout=log, stderr=subprocess.STDOUT, timeout=left, check=False
            )
            why = "" if done.returncode == 0 else f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            why = f"stopped after {left:.0f} s"
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return {"name": step.name, "ok": not why, "why": why, "seconds": round(time.monotonic() - started, 1),
            "measured": _measurements(lines), "last": [line[:300] for line in lines[-6:]]}  # fmt: skip


def _measurements(lines: list[str]) -> dict[str, Any]:
    for line in reversed(lines):
        if line.startswith(('{"shape"', '{"attention"', '{"transfer"')):
            return dict(json.loads(line))
    return {}


if __name__ == "__main__":
    raise SystemExit(main())
