"""The newest events of a journal, by number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdctl.supervisor.dashboard.feed import KEPT, Feed
from pdctl.supervisor.rundir.journal import EVENTS, Journal
from pdctl.supervisor.rundir.journal_reader import JournalReader


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path, lambda process, message: None)


def messages(feed: Feed, number: int) -> list[str]:
    return [json.loads(bytes(line))["message"] for line in feed.after(number)]


def test_what_was_there_and_what_comes(journal: Journal) -> None:
    journal.say("a", "one")
    feed = Feed(journal)
    feed.read()
    seen = feed.total
    assert messages(feed, 0) == ["one"]
    journal.say("a", "two")
    journal.say("a", "three")
    assert messages(feed, seen) == []
    feed.read()
    assert messages(feed, seen) == ["two", "three"]
    assert messages(feed, feed.total) == []


def test_only_the_newest_are_kept(journal: Journal) -> None:
    for number in range(2 * KEPT):
        journal.say("a", str(number))
    feed = Feed(journal)
    feed.read()
    assert messages(feed, 0) == [str(number) for number in range(KEPT, 2 * KEPT)]


def test_a_service_without_events(journal: Journal) -> None:
    feed = Feed(journal)
    feed.read()
    assert feed.after(0) == ()
    journal.say("a", "one")
    feed.read()
    assert messages(feed, 0) == ["one"]


@pytest.mark.parametrize("size", [1, 40, 41, 100, 10**6])
def test_a_reader_near_the_end_begins_with_a_whole_line(tmp_path: Path, size: int) -> None:
    lines = [json.dumps({"at": "", "process": "p", "event": "note", "message": str(n)}).encode() for n in range(9)]
    (tmp_path / EVENTS).write_bytes(b"\n".join(lines) + b"\n")
    found = [entry.line for entry in JournalReader.near_end(tmp_path, size).read()]
    kept = min(len(lines), (size + 1) // (len(lines[0]) + 1) if size < 10**6 else len(lines))
    assert found == lines[len(lines) - kept :]
