"""The control API's messages: what JSON they are, what is written of them, and what a client makes of bad answers."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from pdctl.control_api import (
    SOCKET,
    ApplyProgress,
    ControlClient,
    KvStatus,
    Lease,
    MeasuredProcess,
    MeasuredStatus,
    ProcessState,
    ProcessStatus,
    ServiceStatus,
    cluster_messages,
    document,
    messages,
    usage_messages,
)
from pdctl.control_api.client import event_of
from pdctl.errors import NotAnswering, NotRunning, PdctlError
from pdctl.supervisor.rundir.rundir import RunDir
from pdctl.supervisor.unit.lifecycle import Phase
from tests.supervisor.fleet import plan_of

ROOT = Path(__file__).parent.parent
PROCESS = ProcessStatus(
    name="decode-0", kind="builtin", role="decode", group="decode", state="ready", reason="", pid=7, restarts=0,
    last_exit=None, device="cpu", cpus=(0, 1), gpus=(), rdma=(), ports={"http": 18100}, ready_since=None, epoch="0-1",
    adopted=False, log="/decode-0.log", phase="", phase_s=None,
)  # fmt: skip
MEASURED = MeasuredProcess(
    **msgspec.structs.asdict(PROCESS), rss_bytes=1, cpu_percent=None, gpu_memory_bytes=None, running=2, waiting=0,
    kv_used=0.5, leases=None, tokens_per_s=1.5, prompts_own=3, prompts_received=None, attention=None, cuda_graphs=None,
)  # fmt: skip
STATUS = MeasuredStatus(
    service="t", state="ready", failure=None, proxy_url="http://127.0.0.1:8000", model="m", served_model_name="m",
    tls_cert="", supervisor_pid=1, run_dir="/r/t", log_dir="/s/t", source="", trees="sweep",
    apply=ApplyProgress(state="running", step="adding decode-1", error=""), processes=(MEASURED,), attached=(),
    links=(),
)  # fmt: skip


def test_the_page_is_written_from_the_messages() -> None:
    assert (ROOT / "docs" / "status-json.md").read_text() == document.text(), "write it again with: scripts/status-json"


def test_every_field_of_a_message_says_what_it_means() -> None:
    found = [kind for module in (messages, cluster_messages, usage_messages) for kind in vars(module).values()]
    kinds = {kind for kind in found if isinstance(kind, type) and issubclass(kind, msgspec.Struct)}
    assert len(kinds) > 15
    for kind in kinds:
        assert kind is msgspec.Struct or all(meaning for _, _, meaning in document._fields(kind)), kind


def test_every_event_and_call_is_on_the_page() -> None:
    text = document.text()
    supervisor = [path.read_text() for path in (ROOT / "pdctl" / "supervisor").rglob("*.py")]
    event = re.compile(r'\.say\([^()]*(?:\([^()]*\)[^()]*)*?, "([a-z_]+)"')
    said = {name for source in supervisor for name in event.findall(source)}
    assert {"started", "exited", "asked", "service_ready"} <= said
    assert said <= set(re.findall(r"`([a-z_]+)`", text))
    for path in re.findall(r'Route\("([^"]+)"', "".join(supervisor)):
        assert path.replace("{name:path}", "NAME").replace("{verb}", "VERB") in text


def test_states_are_those_of_a_life() -> None:
    assert set(get_args(ProcessState)) == {phase.value for phase in Phase}


def test_a_status_is_the_json_it_always_was() -> None:
    found = json.loads(msgspec.json.encode(STATUS))
    assert list(found) == [
        "service", "state", "failure", "proxy_url", "model", "served_model_name", "tls_cert", "supervisor_pid",
        "run_dir", "log_dir", "source", "trees", "apply", "processes", "attached", "links", "nodes",
        "registry", "proxy_urls", "unplaced", "refused", "supervisor_epoch", "version",
    ]  # fmt: skip
    assert list(found["processes"][0]) == [
        "name", "kind", "role", "group", "state", "reason", "pid", "restarts", "last_exit", "device", "cpus", "gpus",
        "rdma", "ports", "ready_since", "epoch", "adopted", "log", "phase", "phase_s", "planned_role",
        "leaving_role", "node", "takeover", "rss_bytes", "cpu_percent", "gpu_memory_bytes", "running", "waiting",
        "kv_used", "leases", "tokens_per_s", "leaving_work", "prompts_own", "latency",
        "prompts_received", "attention", "cuda_graphs", "prefix_hit_rate",
    ]  # fmt: skip
    assert found["failure"] is None
    assert found["processes"][0]["kv_used"] == 0.5
    assert found["processes"][0]["leases"] is None
    assert msgspec.json.decode(msgspec.json.encode(STATUS), type=MeasuredStatus) == STATUS


def test_without_measurements_their_fields_are_left_out() -> None:
    plain = ServiceStatus(**(msgspec.structs.asdict(STATUS) | {"processes": (PROCESS,)}))
    assert not {"rss_bytes", "running"} & json.loads(msgspec.json.encode(plain))["processes"][0].keys()
    assert plain.process("decode-0") == PROCESS
    assert plain.process("decode-1") is None


def test_leaks_alone() -> None:
    good = Lease(
        id="a", request_id="r", holder="p@1", state="held", age_s=1.0, quiet_s=0.5, blocks=1, bytes=2, leak="",
        engine="prefill-0",
    )  # fmt: skip
    bad = msgspec.structs.replace(good, id="b", leak="its holder is gone")
    found = KvStatus(engines=(), leases=(good, bad), unreachable={})
    assert found.leaks_alone().leases == (bad,)


def test_an_event_keeps_what_belongs_to_it() -> None:
    line = '{"at": "now", "process": "a", "event": "exited", "message": "gone", "code": 1, "signal": null}'
    event = event_of("ab.7", line)
    assert (event.cursor, event.process, event.event, event.message) == ("ab.7", "a", "exited", "gone")
    assert event.detail == {"code": 1, "signal": None}


# -- a client, and whoever answers it ----------------------------------------------------------------------


@contextmanager
def answering(run_dir: Path, answer: Callable[[socket.socket], None]) -> Iterator[None]:
    """A supervisor, to who looks for one, that answers one call like this."""
    locked = RunDir(run_dir)
    locked.acquire()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(run_dir / SOCKET))
        listener.listen()

        def once() -> None:
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as sent:
                # To its end: a connection that is closed with bytes unread is reset, and the answer with it.
                length = 0
                while (line := sent.readline()) not in (b"\r\n", b""):
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                sent.read(length)
                answer(connection)

        thread = threading.Thread(target=once)
        thread.start()
        try:
            yield
        finally:
            thread.join()
            locked.release()


def says(body: bytes, status: str = "200 OK") -> Callable[[socket.socket], None]:
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return lambda connection: connection.sendall(head.encode() + body)


def test_an_answer_is_decoded(tmp_path: Path) -> None:
    with answering(tmp_path / "t", says(msgspec.json.encode(STATUS))):
        assert ControlClient(tmp_path / "t").status() == STATUS


@pytest.mark.parametrize("body", [b"{}", b"[]", b'{"service": 7}'])
def test_an_answer_of_another_shape_is_told_as_one_of_another_version(tmp_path: Path, body: bytes) -> None:
    with (
        answering(tmp_path / "t", says(body)),
        pytest.raises(PdctlError, match="the supervisor of service 't' gave an unknown answer"),
    ):
        ControlClient(tmp_path / "t").status(measurements=False)


@pytest.mark.parametrize("cut", [says(b"Internal Server Error", "500 Internal Server Error"), lambda connection: None])
def test_a_supervisor_that_answers_nothing_of_use_does_not_answer(
    tmp_path: Path, cut: Callable[[socket.socket], None]
) -> None:
    with answering(tmp_path / "t", cut), pytest.raises(NotAnswering, match="is running but does not answer"):
        ControlClient(tmp_path / "t").leases()


def test_a_refusal_is_told_with_its_reason(tmp_path: Path) -> None:
    client, plan = ControlClient(tmp_path / "t"), plan_of(tmp_path)
    reply = says(b'{"ok": false, "reason": "the service is going down"}', "409 Conflict")
    calls: list[Callable[[], object]] = [
        lambda: client.act("a", "stop"), lambda: client.changes(plan), lambda: client.apply(plan),
    ]  # fmt: skip
    for call in calls:
        with answering(tmp_path / "t", reply), pytest.raises(PdctlError, match="the service is going down"):
            call()


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(NotRunning, match="service 't' is not running"):
        ControlClient(tmp_path / "t").plan()


def test_others_that_run_are_named(tmp_path: Path) -> None:
    other = RunDir(tmp_path / "other")
    other.acquire()
    try:
        with pytest.raises(NotRunning) as failure:
            ControlClient(tmp_path / "t").plan()
    finally:
        other.release()
    assert failure.value.hint == "running: other; choose one with -s"
