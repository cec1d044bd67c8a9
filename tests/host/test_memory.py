"""Memory limits of cgroups, versions 1 and 2, over fake trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdctl.host.memory import read_group_room

MIB = 1 << 20


def plant(root: Path, group: str, names: tuple[str, str], limit: str, used: int, cache: int = 0) -> None:
    folder = root / "sys/fs/cgroup" / group
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")


def room(root: Path, cgroup: str) -> int | None:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    return read_group_room(root / "proc", root / "sys")


V2, V1 = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")


def test_the_narrowest_group_above_counts(tmp_path: Path) -> None:
    plant(tmp_path, "a", V2, str(64 * MIB), 10 * MIB, 4 * MIB)
    plant(tmp_path, "a/b", V2, "max", 10 * MIB)
    assert room(tmp_path, "0::/a/b\n") == 58 * MIB
    plant(tmp_path, "a/b", V2, str(MIB), 10 * MIB)
    assert room(tmp_path, "0::/a/b\n") == 0


def test_a_container_sees_only_the_root_of_its_group(tmp_path: Path) -> None:
    plant(tmp_path, "", V2, str(8 * MIB), MIB)
    assert room(tmp_path, "0::/docker/0123\n") == 7 * MIB


@pytest.mark.parametrize(("limit", "left"), [(str(8 * MIB), 7 * MIB), ("9223372036854771712", None)])
def test_version_1(tmp_path: Path, limit: str, left: int | None) -> None:
    plant(tmp_path, "memory/x", V1, limit, MIB)
    assert room(tmp_path, "5:devices:/y\n4:memory:/x\n0::/\n") == left


def test_none_that_is_limited(tmp_path: Path) -> None:
    assert room(tmp_path, "0::/\n") is None
    assert read_group_room(tmp_path / "nowhere", tmp_path) is None
