"""A log read piece by piece is the log: over starts, cuts and lines that are still being written."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdctl.supervisor.process.logs import archive_of, cap, parts
from pdctl.supervisor.process.logs.parts import log_names, read_part


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "a.log"
    path.write_text("1\n2\n3\n")
    return path


def rest(folder: Path, place: str = "", previous: bool = False, last: int = 10_000) -> tuple[list[str], str]:
    """All lines from a place on, and the place behind them."""
    lines: list[str] = []
    while True:
        part = read_part(folder, "a", place, previous, last)
        lines += part.text.splitlines()
        place = part.place
        if not part.more:
            return lines, place


def test_it_goes_on_where_it_was(log: Path) -> None:
    lines, place = rest(log.parent)
    assert lines == ["1", "2", "3"]
    assert rest(log.parent, place) == ([], place)
    with log.open("a") as file:
        file.write("4\nhal")
        file.flush()
        lines, place = rest(log.parent, place)
        assert lines == ["4"]
        file.write("f\n")
    assert rest(log.parent, place)[0] == ["half"]


def test_only_whole_lines_of_the_end(log: Path) -> None:
    assert rest(log.parent, last=4)[0] == ["2", "3"]
    assert rest(log.parent, last=3)[0] == ["3"]
    assert rest(log.parent, last=0)[0] == []


def test_pieces_are_bounded(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_MOST", 10)
    log.write_text("".join(f"{number}\n" for number in range(50)) + "x" * 25 + "\nend\n")
    assert "".join(rest(log.parent)[0]) == "".join(map(str, range(50))) + "x" * 25 + "end"
    assert len(read_part(log.parent, "a", "", False, 1000).text) <= 10


def test_what_a_process_wrote_before_its_next_start_is_not_lost(log: Path) -> None:
    place = rest(log.parent)[1]
    with log.open("a") as file:
        file.write("last words")
    log.rename(log.with_name("a.log.1"))
    log.write_text("again\n")
    assert rest(log.parent, place)[0] == ["last words", "again"]
    assert rest(log.parent)[0] == ["again"]
    assert rest(log.parent, previous=True)[0] == ["1", "2", "3", "last words", "again"]


def test_a_log_that_is_cut_at_its_start_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    lines = [f"{number:07}" for number in range(20_000)]
    log.write_text("\n".join(lines) + "\n")
    place = read_part(tmp_path, "a", "", False, 100_000).place
    try:
        assert cap(log, 64 * 1024)
    except OSError as failure:
        pytest.skip(str(failure))
    assert archive_of(log).exists()
    assert rest(tmp_path, place)[0] == []
    assert rest(tmp_path, previous=True)[0][-5:] == lines[-5:]


def test_a_place_that_is_gone_begins_with_this_start(log: Path) -> None:
    assert rest(log.parent, "1.0")[0] == ["1", "2", "3"]


def test_only_logs_can_be_read(log: Path) -> None:
    (log.parent / "secret.txt").write_text("x")
    assert log_names(log.parent) == ("a",)
    for name in ("secret.txt", "../" + log.parent.name + "/a", "b", ""):
        with pytest.raises(LookupError, match="known: a"):
            read_part(log.parent, name, "", False, 10)
