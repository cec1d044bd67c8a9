"""Shared memory of real processes, killed before they could remove it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdctl.supervisor.process.shared_memory import mapped, remove_unused

HOLDER = """
import sys
from multiprocessing import resource_tracker, shared_memory
found = shared_memory.SharedMemory(create=not sys.argv[1:], size=4096, name=sys.argv[1] if sys.argv[1:] else None)
resource_tracker.unregister(found._name, "shared_memory")
print(found.name, flush=True)
sys.stdin.read()
"""


class Holder:
    def __init__(self, *name: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, *name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.name = self.process.stdout.readline().strip()

    @property
    def path(self) -> Path:
        return Path("/dev/shm", self.name)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def holder() -> Iterator[Holder]:
    made = Holder()
    yield made
    made.kill()
    made.path.unlink(missing_ok=True)


def test_what_a_killed_process_mapped_is_removed(holder: Holder) -> None:
    found = mapped([holder.process.pid])
    assert str(holder.path) in found
    assert remove_unused({str(holder.path)}) == [], "it is still mapped"
    holder.kill()
    assert holder.path.exists()
    assert remove_unused({str(holder.path)}) == [str(holder.path)]
    assert not holder.path.exists()
    assert mapped([holder.process.pid]) == set(), "a process that is gone maps nothing"


def test_what_another_process_maps_stays(holder: Holder) -> None:
    other = Holder(holder.name)
    try:
        holder.kill()
        assert remove_unused({str(holder.path)}) == []
        assert holder.path.exists()
    finally:
        other.kill()


def test_what_is_removed_already_is_not_counted(holder: Holder) -> None:
    holder.path.unlink()
    assert str(holder.path) not in mapped([holder.process.pid])
    assert remove_unused({str(holder.path)}) == []
