"""An external engine kind (tests/adapters/echo) works with plan, supervisor, proxy and failover.

Its hand-shake is concurrent: the proxy calls both engines of a pair at once, and they connect at a port that the plan
chose.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from pdctl.adapters import KINDS_ENV
from pdctl.control_api import MeasuredProcess
from tests.service import REPOSITORY, Run, Service, pid_of, running, temporary_run, topology, wait_until

pytestmark = pytest.mark.e2e
PROMPT = "abcdefg"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with pytest.MonkeyPatch.context() as patch, temporary_run() as run:
        patch.setenv(KINDS_ENV, "echo=tests.adapters.echo")
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        patch.setenv("ECHO_TOKEN_S", "0.02")
        with running(run, topology(prefills=2, decodes=2, engine_extra='kind = "echo"')) as found:
            yield found


def progress(service: Service, name: str) -> dict[str, Any]:
    port = service.process(name).ports["http"]
    return dict(httpx.get(f"http://127.0.0.1:{port}/progress", trust_env=False).json())


def in_background(service: Service, **options: Any) -> tuple[threading.Thread, dict[str, Any]]:
    found: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: found.update(service.stream(PROMPT, **options)), daemon=True)
    thread.start()
    return thread, found


def kill(service: Service, name: str) -> MeasuredProcess:
    before = service.process(name)
    os.kill(pid_of(before), signal.SIGKILL)
    return before


def test_the_plan_gives_every_engine_the_ports_of_its_kind(service: Service) -> None:
    plan = json.loads(service.run.cli("plan", "--json", check=True).stdout)
    engines = [spec for spec in plan["processes"] if spec["kind"] == "echo"]
    ports = [port for spec in engines for port in spec["ports"].values()]
    assert all(set(spec["ports"]) == {"http", "bootstrap"} for spec in engines)
    assert len(set(ports)) == 2 * len(engines) == 8


def test_pairs_answer_whole_and_streamed(service: Service) -> None:
    expected = "abcdefgabcdef"
    assert service.complete(PROMPT, max_tokens=13)["text"] == expected
    streamed = service.stream(PROMPT, max_tokens=13)
    assert (streamed["text"], streamed["finish_reason"]) == (expected, "length")
    assert streamed["token_ids"] == list(expected.encode())
    assert all(progress(service, f"prefill-{n}")["rooms"] == 0 for n in (0, 1)), "every prompt was fetched"


def test_a_stream_survives_its_decode_engine(service: Service) -> None:
    thread, found = in_background(service, max_tokens=200)
    busy = wait_until(
        lambda: next((n for n in ("decode-0", "decode-1") if progress(service, n)["running"]), None), what="a stream"
    )
    before = kill(service, busy)
    thread.join(60)
    assert found["text"] == (PROMPT * 29)[:200]
    service.restarted(before)
    service.healthy()


def test_a_dead_prefill_ends_neither_streams_nor_service(service: Service) -> None:
    thread, found = in_background(service, max_tokens=150)
    wait_until(lambda: any(progress(service, f"decode-{n}")["running"] for n in (0, 1)), what="a stream")
    dead = [kill(service, name) for name in ("prefill-0", "prefill-1")]
    after = service.stream(PROMPT, max_tokens=10)
    thread.join(60)
    assert found["text"] == (PROMPT * 22)[:150]
    assert after["text"] == "abcdefgabc"
    for before in dead:
        service.restarted(before)
    service.healthy()


def test_what_the_kind_cannot_resume_ends_with_a_reason(service: Service) -> None:
    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 200, "stream": True}
    with service.client.stream("POST", "/v1/chat/completions", json=chat) as answer:
        lines = answer.iter_lines()
        next(line for line in lines if '"token_ids"' in line or '"text"' in line)
        busy = next(n for n in ("decode-0", "decode-1") if progress(service, n)["running"])
        before = kill(service, busy)
        assert any("answers chats once" in line for line in lines)
    service.restarted(before)
    service.healthy()


def test_the_supervisor_asks_only_for_what_the_kind_can_do(service: Service) -> None:
    found = json.loads(service.run.cli("kv", "--json", check=True).stdout)
    assert found["engines"] == found["leases"] == []
    assert found["unreachable"] == {}
    assert not service.status().links
    events = service.run.cli("events").stdout
    assert "not every proxy" not in events
    assert "did not accept the role" not in events
    assert service.run.cli("kv", "--revoke", "nothing").returncode == 1


def test_an_entry_that_names_no_kind_is_refused() -> None:
    with temporary_run() as run:
        run.write(topology())
        for entry in ("echo", "builtin=tests.adapters.echo", "a b=c", "mine=no.such.package", "mine=json"):
            done = Run.cli(run, "plan", extra={KINDS_ENV: entry})
            assert done.returncode == 1
            assert KINDS_ENV in done.stderr
            assert "Traceback" not in done.stderr
