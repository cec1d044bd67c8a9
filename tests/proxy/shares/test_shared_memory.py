"""Memory that workers share must not end a worker: not even on a full disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pdctl.proxy.shares import shared_memory as shared_memories
from pdctl.proxy.shares.shared_memory import shared_memory

SIZE = 2**20


def file_of(folder: Path) -> Path:
    [file] = folder.glob("memory*")
    return file


def test_all_workers_see_it(tmp_path: Path) -> None:
    one, other = (shared_memory(tmp_path / "memory", SIZE) for _ in range(2))
    one[7] = 9
    assert (other[7], other[8]) == (9, 0)


def test_a_worker_that_needs_less_ends_no_other(tmp_path: Path) -> None:
    """A read behind the end of a mapped file is a SIGBUS: so the file stays as long as it was."""
    one = shared_memory(tmp_path / "memory", 2 * SIZE)
    one[2 * SIZE - 1] = 7
    other = shared_memory(tmp_path / "memory", SIZE)
    assert len(other) == SIZE
    assert file_of(tmp_path).stat().st_size == 2 * SIZE
    assert one[2 * SIZE - 1] == 7


def test_each_version_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = shared_memory(tmp_path / "memory", SIZE)
    monkeypatch.setattr(shared_memories, "__version__", "9.9.9")
    other = shared_memory(tmp_path / "memory", SIZE)
    one[7] = 9
    assert other[7] == 0


def test_it_has_no_holes(tmp_path: Path) -> None:
    """A write to a hole is a SIGBUS when the disk is full."""
    shared_memory(tmp_path / "memory", SIZE)
    assert file_of(tmp_path).stat().st_blocks * 512 >= SIZE


def test_without_room_a_worker_is_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    one, other = (shared_memory(tmp_path / "memory", SIZE) for _ in range(2))
    one[:] = b"x" * SIZE
    assert other[7] == 0
    assert "No space left on device" in caplog.text
