"""No event is lost permanently because of a full disk."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pdctl.control_api import ExitReport
from pdctl.supervisor.rundir.journal import EVENTS, EXITS, Journal, read_entries, read_exits

KILLED = ExitReport(
    process="a", at="now", code=None, signal="SIGKILL", reason="killed by SIGKILL", expected=False, by="somebody else",
    oom=False, pid=7, epoch="0-1", lived_s=1.5, core_dumped=False, rusage=None, log="/a.log", last_lines=("bye",),
    kernel=(),
)  # fmt: skip


@contextmanager
def disk_of(num_bytes: int) -> Iterator[None]:
    """Limit the size of files, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_a_full_disk_refused_is_written_later(tmp_path: Path) -> None:
    said: list[str] = []
    journal = Journal(tmp_path, lambda name, message: said.append(message))
    with disk_of(300):
        for number in range(10):
            journal.say("a", f"event {number}")
        size = (tmp_path / EVENTS).stat().st_size
        assert size <= 300
        assert all(json.loads(line) for line in (tmp_path / EVENTS).read_text().splitlines()), "no half lines"
    assert len([message for message in said if "cannot be written" in message]) == 1
    journal.say("a", "event 10")
    assert [entry["message"] for entry in read_entries(tmp_path, EVENTS)] == [f"event {n}" for n in range(11)]


def test_exits_are_known_while_the_disk_is_full(tmp_path: Path) -> None:
    journal = Journal(tmp_path, lambda name, message: None)
    with disk_of(0):
        journal.exit(KILLED)
        assert read_entries(tmp_path, EXITS) == []
        assert journal.exits() == (KILLED,)


def test_exits_are_read_as_they_were_written(tmp_path: Path) -> None:
    Journal(tmp_path, lambda name, message: None).exit(KILLED)
    with (tmp_path / EXITS).open("a") as file:
        file.write(json.dumps({"process": "b", "of": "another pdctl"}) + "\n")
    assert read_exits(tmp_path) == [KILLED]
