"""The sockets between front and core: two one-way ipc pipes with msgpack messages."""

from __future__ import annotations

from pathlib import Path

# Limit of both queues: if the other side stops reading, sends fail or wait instead of using up memory.
HIGH_WATER = 10_000


def to_core(run_dir: Path, name: str) -> str:
    """Address of the pipe from front to core."""
    return f"ipc://{run_dir}/ipc/{name}.in"


def from_core(run_dir: Path, name: str) -> str:
    """Address of the pipe from core to front."""
    return f"ipc://{run_dir}/ipc/{name}.out"
