from __future__ import annotations

import os
import sys

import pytest

from pdctl.commands.inspect import cells, status
from pdctl.control_api import MeasuredProcess


def process(name: str, restarts: int = 0) -> MeasuredProcess:
    return MeasuredProcess(
        name=name, kind="builtin", role="decode", group="decode", state="ready", reason="", pid=1, restarts=restarts,
        last_exit=None, device="cpu", cpus=(0, 1, 2, 7), gpus=(), rdma=(), ports={"http": 18100}, ready_since=None,
        epoch="0-1", adopted=False, log="/decode-0.log", rss_bytes=1 << 20, cpu_percent=12.0, gpu_memory_bytes=None,
        running=3, waiting=0, kv_used=0.25, leases=1, tokens_per_s=9.6, phase="", phase_s=None,
        prompts_own=3, prompts_received=1, latency=None, attention="gather: the device is a CPU", cuda_graphs=None,
        prefix_hit_rate=0.375,
    )  # fmt: skip


def columns(monkeypatch: pytest.MonkeyPatch, width: int) -> list[str]:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("shutil.get_terminal_size", lambda fallback: os.terminal_size((width, 24)))
    header, rows = status._fitting([process("decode-0"), process("decode-1", restarts=2)])
    if len(header) > 2:
        assert sum(max(len(row[n]) for row in [header, *rows]) + 2 for n in range(len(header))) - 2 <= width
    return header


def test_as_many_columns_as_the_screen_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = columns(monkeypatch, 200)
    assert "GPU MEM" not in wide, "a column that says nothing takes no room"
    assert {"TOK/S", "INLINE", "HITS", "LAST EXIT", "CPUS"} <= set(wide)
    narrow = columns(monkeypatch, 60)
    assert set(narrow) < set(wide)
    assert {"PROCESS", "STATE", "RESTARTS"} <= set(narrow)
    assert columns(monkeypatch, 20)[:1] == ["PROCESS"]


def test_numbers_are_put_together() -> None:
    assert cells.ranges([0, 1, 2, 3, 8]) == "0-3,8"
    assert cells.ranges([4, 5]) == "4,5"
    assert cells.ranges([]) == "-"
