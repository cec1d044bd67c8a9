"""CPU time of an engine's core until it is ready, compared with importing its packages, in one run.

    python -m benchmarks.engine_start [--rounds 4]

Rounds alternate. CPU time is measured because other work on the machine changes wall time.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys

import psutil

from tests.service import running, single, temporary_run

_BARE = "import torch, transformers.models.qwen3.modeling_qwen3"


def bare() -> float:
    """CPU seconds of a Python that imports torch and the sample's model class."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", _BARE], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def core() -> float:
    """CPU seconds of a core that has just become ready."""
    with temporary_run() as run, running(run, single(kv_cache_gb=0.1)) as service:
        (child,) = psutil.Process(service.process("hybrid-0").pid).children()
        used = child.cpu_times()
        return float(used.user + used.system)


def main() -> None:
    """Print both medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    rounds = parser.parse_args().rounds
    pairs = [(bare(), core()) for _ in range(rounds)]
    imported, ready = (statistics.median(values) for values in zip(*pairs, strict=True))
    ratio = statistics.median(after / before for before, after in pairs)
    print(f"import {imported:.2f} s, core ready {ready:.2f} s of CPU: {ratio:.2f} times")


if __name__ == "__main__":
    main()
