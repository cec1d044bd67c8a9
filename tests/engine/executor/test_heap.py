from __future__ import annotations

import subprocess
import sys

import pytest

_SCRIPT = """
import resource, sys, torch
from pdctl.engine.executor.heap import keep_freed_memory
if sys.argv[1] == "kept" and not keep_freed_memory():
    print(-1)
    raise SystemExit
for _ in range(3):
    torch.empty(10 << 20).fill_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.empty(10 << 20).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Page faults when 40 MiB are allocated again."""
    done = subprocess.run([sys.executable, "-c", _SCRIPT, how], capture_output=True, text=True, timeout=120, check=True)
    return int(done.stdout)


def test_freed_memory_is_used_again() -> None:
    kept = faults("kept")
    if kept < 0:
        pytest.skip("this C library has no mallopt")
    assert kept < 100
    assert faults("not kept") > 1000
