from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdctl.commands.inspect.follow import Follower, merged
from pdctl.supervisor.process import logs

LINE = b"%07d ........................................................\n"


def text_of(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(logs.first_byte(file.fileno()))
        return file.read().lstrip(b"\0")


@settings(max_examples=20)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=6), st.integers(8, 64))
def test_no_line_is_lost_when_a_log_in_use_is_cut(
    tmp_path_factory: pytest.TempPathFactory, writes: list[int], kib: int
) -> None:
    path = tmp_path_factory.mktemp("logs") / "a.log"
    descriptor = logs.open_new(path)
    written, kept = 0, b""
    try:
        for count in writes:
            for _ in range(count):
                os.write(descriptor, LINE % written)
                written += 1
            if logs.cap(path, kib * 1024):
                kept += logs.archive_of(path).read_bytes()
    finally:
        os.close(descriptor)
    assert kept + text_of(path) == b"".join(LINE % number for number in range(written))
    assert path.stat().st_blocks * 512 <= max(kib * 1024, len(LINE % 0) * writes[-1]) + 8192


def test_incarnations_are_kept_and_the_oldest_goes(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    for number in range(8):
        descriptor = logs.open_new(path)
        os.write(descriptor, str(number).encode())
        os.close(descriptor)
    assert path.read_text() == "7"
    assert [(tmp_path / f"a.log.{n}").read_text() for n in range(1, 6)] == ["6", "5", "4", "3", "2"]
    assert not (tmp_path / "a.log.6").exists()


def test_a_follower_misses_nothing_of_an_incarnation_that_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.log"
    first = logs.open_new(path)
    follower = Follower({"a": path})
    os.write(first, b"one\ntwo")
    follower.show_new()
    os.write(first, b" and more\nlast words\n")
    os.close(first)
    second = logs.open_new(path)
    os.write(second, b"three\n")
    os.close(second)
    follower.show_new()
    assert [line.split("| ")[1] for line in capsys.readouterr().out.splitlines()] == [
        "one", "two and more", "last words", "three",
    ]  # fmt: skip


def test_logs_are_merged_by_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a.log", tmp_path / "b.log"
    a.write_text("2026-11-23 21:00:00,500 a1\n  more of a1\n2026-11-23 21:00:02,000 a2\n")
    b.write_text("2026-11-23 21:00:01,000 b1\n")
    (tmp_path / "a.log.1").write_text("2026-11-23 20:00:00,000 a0\n")
    files = {"a": a, "b": b}

    def shown(after: float, previous: bool) -> list[str]:
        merged(files, Follower(dict(files)), after, previous)
        return [line.split("| ")[1].split()[-1] for line in capsys.readouterr().out.splitlines()]

    assert shown(0, False) == ["a1", "a1", "b1", "a2"]
    assert shown(0, True) == ["a0", "a1", "a1", "b1", "a2"]
    from datetime import datetime

    assert shown(datetime.fromisoformat("2026-11-23T21:00:01").timestamp(), True) == ["b1", "a2"]
