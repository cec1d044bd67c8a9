"""What is read: states, events, measurements and the proxy's metrics."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pdctl.commands.top import feed
from pdctl.commands.top.feed import Feed, scrape
from pdctl.control_api import MeasuredStatus, ServiceStatus
from pdctl.errors import NotAnswering, NotRunning, PdctlError
from tests.commands.top.made import process, service
from tests.commands.top.test_board import unmeasured
from tests.commands.top.test_rates import SCRAPE


class Control:
    """Answers as set; `failure` is raised instead."""

    found = service(1, 1)
    failure: PdctlError | None = None

    def __init__(self, run_dir: Path) -> None: ...

    def status(self, measurements: bool = True) -> ServiceStatus:
        if self.failure is not None:
            raise self.failure
        return self.found if measurements else bare(self.found)


def bare(found: MeasuredStatus) -> ServiceStatus:
    fields = msgspec.structs.asdict(found)
    return ServiceStatus(**(fields | {"processes": tuple(map(unmeasured, found.processes))}))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Feed:
    Control.found, Control.failure = service(1, 1), None
    monkeypatch.setattr(feed, "ControlClient", Control)
    return Feed(tmp_path, tmp_path, bare(Control.found))


def write(folder: Path, *messages: str) -> None:
    with (folder / "events.jsonl").open("a") as file:
        for message in messages:
            file.write(json.dumps({"at": "2026-11-29T02:00:00.000+00:00", "process": "decode-0", "event": "note",
                                   "message": message}) + "\n")  # fmt: skip


def test_events_come_newest_first_and_once(made: Feed, tmp_path: Path) -> None:
    made.read_states()
    assert made.snapshot().events == ()
    write(tmp_path, "a", "b")
    made.read_states()
    write(tmp_path, "c")
    made.read_states()
    assert [event.message for event in made.snapshot().events] == ["c", "b", "a"]
    write(tmp_path, *map(str, range(1000)))
    made.read_states()
    assert [event.message for event in made.snapshot().events[:2]] == ["999", "998"]
    assert len(made.snapshot().events) == 200


def test_the_version_changes_with_what_is_known(made: Feed, tmp_path: Path) -> None:
    made.read_states()
    before = made.version
    made.read_states()
    assert made.version == before, "nothing new"
    Control.found = msgspec.structs.replace(Control.found, state="degraded")
    made.read_states()
    assert made.version == before + 1
    write(tmp_path, "a")
    made.read_states()
    assert made.version == before + 2


def test_a_supervisor_that_is_gone_and_back(made: Feed) -> None:
    Control.failure = NotRunning("service 't' is not running", "start it with: pdctl up")
    made.read_states()
    made.measure()
    found = made.snapshot()
    assert (found.trouble, found.is_running) == ("service 't' is not running; start it with: pdctl up", False)
    assert len(found.status.processes) == 3, "the last that is known"
    Control.failure = NotAnswering("it is silent")
    made.read_states()
    assert (made.snapshot().trouble, made.snapshot().is_running) == ("it is silent", True)
    Control.failure = None
    made.read_states()
    assert made.snapshot().trouble == ""


@contextmanager
def proxy(answer: bytes, status: int = 200) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join(10)


def test_measurements_and_rates(made: Feed) -> None:
    assert made.snapshot().status.processes[0].running is None, "not measured yet"
    with proxy(SCRAPE.encode()) as url:
        assert scrape(url, "") == SCRAPE
        Control.found = msgspec.structs.replace(Control.found, proxy_url=url)
        made.measure()
        made.measure()
    found = made.snapshot()
    assert found.status.processes[0].running == 3
    assert [sample.running for sample in found.samples] == [6, 6]
    assert found.samples[0].rates is None
    assert found.rates is not None
    assert (found.rates.requests, found.rates.waiting) == (0.0, 3)


@pytest.mark.parametrize(("answer", "status"), [(b"not metrics {", 200), (b"\xff\xfe", 200), (b"", 503)])
def test_a_proxy_with_another_answer(made: Feed, answer: bytes, status: int) -> None:
    with proxy(answer, status) as url:
        Control.found = msgspec.structs.replace(Control.found, proxy_url=url)
        made.measure()
    assert made.snapshot().rates is None
    assert made.snapshot().status.processes[0].running == 3, "the engines' measurements are there"


def test_a_proxy_that_is_down(made: Feed) -> None:
    with proxy(b"") as url:
        Control.found = msgspec.structs.replace(Control.found, proxy_url=url)
    made.measure()
    assert made.snapshot().rates is None


def test_a_process_that_died_since_its_measurement(made: Feed) -> None:
    made.measure()
    dead = process("decode-0", state="backoff", pid=None)
    ones = (Control.found.processes[0], dead, Control.found.processes[2])
    Control.found = msgspec.structs.replace(Control.found, processes=ones)
    made.read_states()
    assert [one.running for one in made.snapshot().status.processes] == [3, None, None]
    assert made.snapshot().status.processes[1].state == "backoff"
