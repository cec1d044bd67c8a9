from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from pdctl.commands.inspect import status


def process(name: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name, "role": "decode", "state": "ready", "ready_since": None, "restarts": 0, "pid": 1, "gpus": [],
        "device": "cpu", "cpus": [0, 1, 2, 7], "ports": {"http": 18100}, "cpu_percent": 12.0, "rss_bytes": 1 << 20,
        "gpu_memory_bytes": None, "running": 3, "waiting": 0, "kv_used": 0.25, "leases": 1, "tokens_per_s": 9.6,
        "last_exit": None, "reason": "", **more,
    }  # fmt: skip


def columns(monkeypatch: pytest.MonkeyPatch, width: int) -> list[str]:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("shutil.get_terminal_size", lambda _: os.terminal_size((width, 24)))
    header, rows = status._fitting([process("decode-0"), process("decode-1", restarts=2)])
    if len(header) > 2:
        assert sum(max(len(row[n]) for row in [header, *rows]) + 2 for n in range(len(header))) - 2 <= width
    return header


def test_as_many_columns_as_the_screen_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = columns(monkeypatch, 200)
    assert "GPU MEM" not in wide, "a column that says nothing takes no room"
    assert {"TOK/S", "LAST EXIT", "CPUS"} <= set(wide)
    narrow = columns(monkeypatch, 60)
    assert set(narrow) < set(wide)
    assert {"PROCESS", "STATE", "RESTARTS"} <= set(narrow)
    assert columns(monkeypatch, 20)[:1] == ["PROCESS"]


def test_numbers_are_put_together() -> None:
    assert status._ranges([0, 1, 2, 3, 8]) == "0-3,8"
    assert status._ranges([4, 5]) == "4,5"
    assert status._ranges([]) == "-"
