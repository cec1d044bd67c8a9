"""Measure ways to ship pdctl: `compare.py NAME=COMMAND...`, such as pip=/venv/bin/pdctl binary=dist/pdctl-...

For each: the size of the file; milliseconds of `--help` and `status` (median of rounds in turn, after a first start,
which may unpack); memory of supervisor and proxy of a service whose engines run elsewhere.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[2]
ROUNDS = int(os.environ.get("ROUNDS", "9"))


def size_mb(path: Path) -> float:
    """Of a file, or of everything in a folder."""
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file() and not one.is_symlink()]
    return sum(one.stat().st_size for one in files) / 1e6


def timed(argv: list[str], env: dict[str, str]) -> tuple[float, float]:
    """Milliseconds by the clock, and of CPU."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1e3 * wall, 1e3 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def memory_mb(program: str, folder: Path, env: dict[str, str]) -> dict[str, float]:
    """Proportional memory of supervisor and proxy."""
    sys.path.insert(0, str(REPOSITORY))
    from tests.e2e.test_proxy import Worker, text

    workers = [Worker("prefill", 0), Worker("decode", 0)]
    file = folder / "pdctl.toml"
    file.write_text(text(workers))
    try:
        subprocess.run([program, "up", "-d", "-f", str(file)], env=env, check=True, capture_output=True)
        time.sleep(3)
        found = {}
        for process in psutil.process_iter():
            try:
                words, ours = process.cmdline(), process.environ().get("PDCTL_RUN") == env["PDCTL_RUN"]
            except psutil.Error:
                continue
            for part in ("pdctl.supervisor", "pdctl.proxy"):
                if ours and part in words:
                    found[part] = process.memory_full_info().pss / 1e6
        return found
    finally:
        subprocess.run([program, "down", "-f", str(file)], env=env, check=False, capture_output=True)
        for worker in workers:
            worker.stop()


def main() -> None:
    """Print a line of JSON for each."""
    ways = dict(word.split("=", 1) for word in sys.argv[1:])
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        env = {"PATH": os.environ["PATH"], "HOME": name, "PDCTL_RUN": f"{name}/run", "PDCTL_STATE": f"{name}/state",
               "LANG": "C.UTF-8"}  # fmt: skip
        first = {way: timed([program, "--help"], env)[0] for way, program in ways.items()}
        times: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for _ in range(ROUNDS):
            for verb in ("--help", "status"):
                for way, program in ways.items():
                    times.setdefault((way, verb), []).append(timed([program, verb], env))
        for way, program in ways.items():
            row: dict[str, object] = {"way": way, "mb": round(size_mb(Path(program)), 1), "first_ms": round(first[way])}
            for verb in ("--help", "status"):
                row[verb] = [round(statistics.median(column)) for column in zip(*times[way, verb], strict=True)]
            row |= {part: round(mb, 1) for part, mb in memory_mb(program, folder, env).items()}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
