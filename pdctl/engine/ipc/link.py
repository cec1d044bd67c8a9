"""The sockets between front and core: two one-way pipes over ipc, msgpack in them."""

from __future__ import annotations

from pathlib import Path

# Bounds both queues: a peer that stopped reading makes sends fail or wait instead of eating memory.
HIGH_WATER = 10_000


def to_core(run_dir: Path, name: str) -> str:
    """Where the front pushes and the core pulls."""
    return f"ipc://{run_dir}/ipc/{name}.in"


def from_core(run_dir: Path, name: str) -> str:
    """Where the core pushes and the front pulls."""
    return f"ipc://{run_dir}/ipc/{name}.out"
