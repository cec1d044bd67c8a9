"""The control API over a real socket. No event is told twice or left out, whoever comes, lags and comes again."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import msgspec
import pytest

from pdctl.control_api import (
    SOCKET,
    ControlClient,
    DashboardOrder,
    DashboardReply,
    Event,
    ExitReport,
    KeysStatus,
    KvStatus,
    MeasuredStatus,
    Node,
    Nodes,
    NodeStatus,
    RoleOrder,
    ServiceStatus,
    UpgradeOrder,
    Verb,
)
from pdctl.errors import NotRunning, PdctlError
from pdctl.plan import Plan
from pdctl.plan.changes import Changes
from pdctl.supervisor.rundir import journal as journals
from pdctl.supervisor.rundir.journal import Journal
from pdctl.supervisor.rundir.rundir import RunDir
from pdctl.supervisor.surface.control import serve_control
from pdctl.supervisor.surface.controlled import OneMachine
from pdctl.supervisor.surface.events import EventStreams
from pdctl.wire import LeaseReply
from tests.supervisor.fleet import fleet, plan_of, shell


class Quiet:
    """A service that has a journal and does nothing."""

    def __init__(self, folder: Path) -> None:
        self.plan = plan_of(folder)
        self.added: list[Node] = []
        self.journal = Journal(folder / "logs", lambda name, message: None)

    def status(self) -> ServiceStatus:
        raise NotImplementedError

    async def fresh_status(self) -> MeasuredStatus:
        raise NotImplementedError

    def exits(self) -> tuple[ExitReport, ...]:
        return ()

    async def keys(self) -> KeysStatus:
        raise NotImplementedError

    async def leases(self) -> KvStatus:
        raise NotImplementedError

    async def revoke(self, lease_id: str) -> LeaseReply:
        return LeaseReply(False, f"no lease {lease_id}")

    def ask(self, name: str, verb: Verb, drain: bool) -> str:
        return f"{name} will not {verb}{', drained' if drain else ''}"

    def change_role(self, name: str, call: RoleOrder) -> str:
        return "" if name == "decode-0" and call.role == "prefill" else "no such engine"

    async def nodes(self) -> Nodes:
        return Nodes(nodes=tuple(NodeStatus(**msgspec.structs.asdict(node)) for node in self.added))

    def add_node(self, node: Node) -> str:
        self.added.append(node)
        return "" if node.role == "decode" else f"{node.name} is no decode engine"

    def remove_node(self, name: str) -> str:
        return f"no engine at {name}"

    def show(self, order: DashboardOrder) -> DashboardReply:
        if order.listen:
            return DashboardReply(ok=False, reason=f"{order.listen} is taken")
        return DashboardReply(ok=True, url="" if order.stop else f"http://here/#{'w' if order.write else 'r'}")

    def changes(self, wanted: Plan) -> Changes:
        return Changes(added=tuple(spec.name for spec in wanted.processes))

    def apply(self, wanted: Plan) -> str:
        return "" if wanted == self.plan else f"{wanted.service} is another"

    async def upgrade(self, order: UpgradeOrder) -> str:
        raise AssertionError("not asked for")

    def stop(self) -> None:
        self.journal.say("pdctl", "asked to stop")


class Surface:
    """A control socket, served by a thread of its own."""

    def __init__(self, folder: Path, heartbeat_s: float, most_waiting: int) -> None:
        self.service = Quiet(folder)
        self.run_dir = RunDir(folder / "r")
        self.client = ControlClient(folder / "r")
        self._limits = (heartbeat_s, most_waiting)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    def say(self, *messages: str) -> None:
        """Write these down, one after the other as a supervisor does, between other work."""
        for message in messages:
            done: Future[None] = asyncio.run_coroutine_threadsafe(self._say(message), self._loop)
            done.result()

    def start(self) -> None:
        self.run_dir.acquire()
        self._thread.start()

    def stop(self) -> None:
        """As when the service is down."""
        self._loop.call_soon_threadsafe(self._serving.cancel)
        self._thread.join()
        self._loop.close()
        self.run_dir.release()

    async def _serve(self) -> None:
        streams = EventStreams(self.service.journal, *self._limits)
        serving = serve_control(self.run_dir.control_socket, OneMachine(self.service), streams)
        self._serving = asyncio.create_task(serving)
        await asyncio.wait([self._serving])

    async def _say(self, message: str) -> None:
        self.service.journal.say("a", message)


@contextmanager
def surface(folder: Path, heartbeat_s: float = 60.0, most_waiting: int = 1000) -> Iterator[Surface]:
    found = Surface(folder, heartbeat_s, most_waiting)
    found.start()
    try:
        yield found
    finally:
        found.stop()


@pytest.fixture
def quiet(tmp_path: Path) -> Iterator[Surface]:
    with surface(tmp_path) as found:
        yield found


def numbers(first: int, count: int) -> list[str]:
    return [str(number) for number in range(first, first + count)]


def told(events: Iterator[Event], count: int) -> list[str]:
    return [event.message for event in islice(events, count)]


def test_what_was_and_what_comes_is_told(quiet: Surface) -> None:
    quiet.say(*numbers(0, 3))
    with closing(quiet.client.events()) as events:
        assert told(events, 3) == numbers(0, 3)
        quiet.say(*numbers(3, 2))
        assert told(events, 2) == numbers(3, 2)


def test_an_event_is_as_the_journal_has_it(quiet: Surface, tmp_path: Path) -> None:
    quiet.service.journal.say("decode-0", "ready \u2603", "ready", after_s=1.5, pid=None)
    with closing(quiet.client.events()) as events:
        event = next(events)
    (line,) = (tmp_path / "logs" / journals.EVENTS).read_text().splitlines()
    assert (event.process, event.event, event.message) == ("decode-0", "ready", "ready \u2603")
    assert event.at == json.loads(line)["at"]
    assert event.detail == {"after_s": 1.5, "pid": None}


def test_each_cursor_resumes_behind_its_event(quiet: Surface) -> None:
    quiet.say(*numbers(0, 6))
    with closing(quiet.client.events()) as events:
        cursors = [event.cursor for event in islice(events, 6)]
    for number, cursor in enumerate(cursors[:-1]):
        with closing(quiet.client.events(cursor)) as events:
            assert told(events, 5 - number) == numbers(number + 1, 5 - number)


def test_a_browser_that_comes_back_names_the_last_event_in_a_header(quiet: Surface) -> None:
    quiet.say(*numbers(0, 4))
    with closing(quiet.client.events()) as events:
        cursors = [event.cursor for event in islice(events, 3)]
    with closing(raw(quiet, f"/v1/events?after={cursors[0]}", {"last-event-id": cursors[2]})) as answer:
        assert answer.getheader("content-type") == "text/event-stream; charset=utf-8"
        assert answer.readline().startswith(b"id: ")
        assert json.loads(answer.readline().removeprefix(b"data: "))["message"] == "3"


def test_cursors_outlive_the_file_that_is_full(quiet: Surface, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full file gets another name, and the one that had it is gone."""
    monkeypatch.setattr(journals, "_MOST", 1000)
    quiet.say("0")
    with closing(quiet.client.events()) as events:
        first = next(events)
        quiet.say(*numbers(1, 40))
        assert told(events, 40) == numbers(1, 40)
    with closing(quiet.client.events()) as events:
        kept = [next(events)]
        while kept[-1].message != "40":
            kept.append(next(events))
    assert [event.message for event in kept] == numbers(int(kept[0].message), len(kept))
    assert int(kept[0].message) > 0
    for cursor in (first.cursor, "0123456789ab.7"):
        with closing(quiet.client.events(cursor)) as events:
            assert told(events, 1) == [kept[0].message], "what is no longer kept begins with the oldest that is"
    with closing(quiet.client.events(kept[2].cursor)) as events:
        assert told(events, 1) == [kept[3].message]


def test_a_cursor_that_is_none_is_refused(quiet: Surface) -> None:
    with pytest.raises(PdctlError, match="'yesterday' is no cursor"):
        next(quiet.client.events("yesterday"))


def test_lines_that_a_full_disk_took_half_of_are_left_out(quiet: Surface, tmp_path: Path) -> None:
    quiet.say("0")
    with (tmp_path / "logs" / journals.EVENTS).open("a") as file:
        file.write('{"at": "2026-\n\n')
    quiet.say("1")
    with closing(quiet.client.events()) as events:
        assert told(events, 2) == ["0", "1"]


def test_a_silent_stream_shows_that_it_lives(tmp_path: Path) -> None:
    with surface(tmp_path, heartbeat_s=0.01) as found, closing(raw(found, "/v1/events")) as answer:
        assert answer.readline() == b": still here\n"
        assert answer.readline() == b"\n"
        found.say("0")
        while (line := answer.readline()).startswith((b":", b"\n")):
            pass
        assert line.startswith(b"id: ")


def test_who_reads_too_slowly_is_ended_and_comes_again(tmp_path: Path) -> None:
    count, long = 3000, "x" * 1000
    with surface(tmp_path, heartbeat_s=0.01, most_waiting=10) as found:
        with closing(raw(found, "/v1/events")) as answer:
            assert answer.readline() == b": still here\n", "it has read all there is"
            found.say(*(f"{number} {long}" for number in range(count)))
            lines = answer.read().splitlines()
        ids = [line.removeprefix(b"id: ").decode() for line in lines if line.startswith(b"id: ")]
        assert 10 < len(ids) < count
        found.say("last")
        with closing(found.client.events(ids[-1])) as events:
            rest = told(events, count - len(ids) + 1)
        messages = [json.loads(line[6:])["message"] for line in lines if line.startswith(b"data: ")]
        assert [text.split()[0] for text in messages + rest] == [*numbers(0, count), "last"]


def test_who_was_never_up_to_date_does_not_lag(tmp_path: Path) -> None:
    with surface(tmp_path, most_waiting=10) as found:
        found.say(*(f"{number} {'x' * 1000}" for number in range(1000)))
        with closing(found.client.events()) as events:
            assert [text.split()[0] for text in told(events, 1000)] == numbers(0, 1000)


def test_everybody_is_told_the_last_of_it(tmp_path: Path) -> None:
    with surface(tmp_path) as found:
        streams = [found.client.events() for _ in range(3)]
        found.say("0")
        assert [next(events).message for events in streams] == ["0"] * 3
        found.say("1", "2")
    assert [[event.message for event in events] for events in streams] == [["1", "2"]] * 3
    with pytest.raises(NotRunning):
        next(found.client.events())


def test_nobody_who_does_not_read_holds_up_the_end(tmp_path: Path) -> None:
    with surface(tmp_path) as found:
        found.say(*(f"{number} {'x' * 1000}" for number in range(3000)))
        answer = raw(found, "/v1/events")
    with closing(answer), pytest.raises(http.client.IncompleteRead):
        answer.read()


def test_a_socket_that_was_removed_ends_streams_and_their_cursors_go_on(quiet: Surface) -> None:
    quiet.say("0")
    events = quiet.client.events()
    first = next(events)
    quiet.run_dir.control_socket.unlink()
    assert list(events) == []
    quiet.say("1")
    with closing(quiet.client.events(first.cursor)) as again:
        assert told(again, 1) == ["1"]


def test_a_reader_that_left_is_forgotten(tmp_path: Path) -> None:
    with surface(tmp_path, heartbeat_s=0.01) as found:
        with closing(raw(found, "/v1/events")) as answer:
            assert answer.readline() == b": still here\n"
        journal = found.service.journal
        while journal._followers:
            found.say("is anybody there?")


def test_the_end_of_a_service_is_told(tmp_path: Path) -> None:
    """A real supervisor: the last event is that of its last process."""
    followed: list[Event] = []
    with fleet(tmp_path, shell("a", "exec sleep 600")) as found:
        found.ready("a")
        events = found.control.events()
        followed.append(next(events))
        reader = threading.Thread(target=lambda: followed.extend(events))
        reader.start()
        found.ask("a", "restart")
        found.until("a", lambda now: now.restarts == 1 and now.state == "ready", "ready again")
        found.down()
        reader.join()
        written = [(event["at"], event["process"], event["event"]) for event in found.events()]
    assert [(event.at, event.process, event.event) for event in followed] == written
    assert (followed[-1].process, followed[-1].event) == ("a", "stopped")
    assert "Traceback" not in found.log()


def test_other_calls_over_the_same_socket(quiet: Surface) -> None:
    client, plan = quiet.client, quiet.service.plan
    assert client.plan() == plan
    assert client.exits().exits == ()
    assert client.changes(plan) == Changes()
    client.apply(plan)
    with pytest.raises(PdctlError, match="other is another"):
        client.apply(replace(plan, service="other"))
    with pytest.raises(PdctlError, match="a will not restart, drained"):
        client.act("a", "restart", drain=True)
    assert client.revoke("x y&z").reason == "no lease x y&z"
    node = Node(kind="lmdeploy", role="decode", host="h", port=1, models=("m",))
    assert client.add_node(node).ok
    assert client.add_node(msgspec.structs.replace(node, role="hybrid")).reason == "h:1 is no decode engine"
    assert (client.dashboard(), client.dashboard(write=True), client.dashboard(stop=True)) == (
        "http://here/#r", "http://here/#w", "",
    )  # fmt: skip
    with pytest.raises(PdctlError, match=r"127.0.0.1:1 is taken"):
        client.dashboard("127.0.0.1:1")
    with pytest.raises(PdctlError, match="not a valid order"):
        client.dashboard("0.0.0.0:8099")
    assert "not a valid registration" in client.add_node(msgspec.structs.replace(node, port=0)).reason
    assert [found.url for found in client.nodes().nodes] == ["http://h:1"] * 2
    assert client.remove_node("[::1]:5").reason == "no engine at [::1]:5"
    client.stop()
    with closing(client.events()) as events:
        assert next(events).message == "asked to stop"


def raw(found: Surface, path: str, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
    """The answer as it comes, and with small buffers before it."""
    found.client.exits()  # it answers by now
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(60)
    connection.connect(str(found.run_dir.path / SOCKET))
    with closing(connection):
        asked = http.client.HTTPConnection("supervisor")
        asked.sock = connection
        asked.request("GET", path, headers=headers or {})
        # The answer keeps the connection until it is closed itself.
        return asked.getresponse()
