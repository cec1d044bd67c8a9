"""SGLang engines behind pdctl: a mock that keeps SGLang's protocol (tests/fakes/sglang), real sockets and kills.

The mock does not notice a closed connection before the first token: only aborts end such requests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from pdctl.control_api import MeasuredProcess
from tests.fakes.sglang.state import answer_of
from tests.service import (
    REPOSITORY,
    Run,
    Service,
    events,
    free_port,
    pid_of,
    running,
    temporary_run,
    topology,
    wait_until,
)

pytestmark = pytest.mark.e2e
PROMPT = "count with me"
# Longer than any test: what a test waits for must end by an abort, not by a timeout of the engines.
LEASE_S = 600


def environment(folder: Path) -> Path:
    """A Python environment with a package `sglang` that is the mock; returns its interpreter."""
    site = folder / "env/lib/python3.11/site-packages"
    (site / "sglang-0.5.23.dist-info").mkdir(parents=True)
    (site / "sglang").mkdir()
    (site / "sglang/__init__.py").touch()
    start = "import asyncio\nfrom tests.fakes.sglang.server import main\nasyncio.run(main())\n"
    (site / "sglang/launch_server.py").write_text(start)
    python = folder / "env/bin/python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site}:{REPOSITORY} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with temporary_run() as run:
        extra = f'kind = "sglang"\ndevice = "cpu"\npython = "{environment(run.folder)}"\n'
        extra += 'env = { MOCK_TOKEN_S = "0.02", SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL = "0.5" }'
        # Each engine in turn: a test that makes one of them fail must reach it.
        turns = 'routing = "round_robin"'
        text = topology(prefills=2, decodes=2, lease_s=LEASE_S, engine_extra=extra, extra=turns)
        with running(run, text) as found:
            yield found


class Mock:
    """One mock engine, by its port."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/mock"

    def told(self) -> dict[str, Any]:
        return dict(httpx.get(self._url, trust_env=False, timeout=60).json())

    def is_idle(self) -> bool:
        told = self.told()
        return not told["rooms"] and not told["running"]

    def fault(self, **faults: object) -> None:
        assert httpx.post(self._url, json=faults, trust_env=False, timeout=60).status_code == 200


def mock(service: Service, name: str) -> Mock:
    return Mock(service.process(name).ports["http"])


def names(service: Service, role: str) -> list[str]:
    return [process.name for process in service.engines() if process.role == role]


@pytest.fixture(autouse=True)
def clean(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test every engine is back, holds no room, runs nothing, and saw no room twice and no call without."""
    yield
    if "service" not in request.fixturenames:
        return
    service: Service = request.getfixturevalue("service")
    wait_until(lambda: all(process.state == "ready" for process in service.engines()), what="all engines ready")
    service.healthy()
    for process in service.engines():
        engine = mock(service, process.name)
        engine.fault()
        wait_until(engine.is_idle, 60, f"an idle {process.name}")
        told = engine.told()
        assert (told["reused"], told["without_room"], told["timeouts"]) == (0, 0, 0)


def in_background(call: Any, **options: Any) -> tuple[threading.Thread, dict[str, Any]]:
    found: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: found.update(call(PROMPT, **options)), daemon=True)
    thread.start()
    return thread, found


def kill(service: Service, name: str, how: signal.Signals = signal.SIGKILL) -> MeasuredProcess:
    before = service.process(name)
    os.kill(pid_of(before), how)
    return before


def busy(service: Service, role: str = "decode") -> str:
    """An engine with a request in it."""

    def look() -> str | None:
        return next((name for name in names(service, role) if mock(service, name).told()["running"]), None)

    return str(wait_until(look, 60, f"a busy {role}"))


def chat(service: Service, words: str, **options: Any) -> dict[str, Any]:
    """A streamed chat: its text by field, and its last events."""
    body = {"messages": [{"role": "user", "content": words}], "temperature": 0, "stream": True, "max_tokens": 60}
    found: dict[str, Any] = {"content": "", "reasoning_content": "", "error": None, "reason": None, "usage": None}
    with service.client.stream("POST", "/v1/chat/completions", json={**body, **options}) as answer:
        for event in events(answer):
            if event is None:
                continue
            found["error"] = event.get("error", found["error"])
            found["usage"] = event.get("usage") or found["usage"]
            for choice in event.get("choices", []):
                for name in ("content", "reasoning_content"):
                    found[name] += choice["delta"].get(name) or ""
                found["reason"] = choice["finish_reason"] or found["reason"]
    return found


def test_pairs_answer_whole_and_streamed(service: Service) -> None:
    expected = answer_of(PROMPT, 13)
    assert service.complete(PROMPT, max_tokens=13)["text"] == expected
    streamed = service.stream(PROMPT, max_tokens=13)
    assert (streamed["text"], streamed["finish_reason"]) == (expected, "length")
    assert streamed["token_ids"] == list(expected.encode())
    assert service.complete(PROMPT, max_tokens=1)["text"] == expected[0], "a prefill engine alone cannot answer"
    whole = service.client.post("/v1/completions", json={"prompt": PROMPT, "temperature": 0, "max_tokens": 13}).json()
    assert (whole["choices"][0]["text"], whole["usage"]["completion_tokens"]) == (expected, 13)


def test_chats_are_streamed_and_counted(service: Service) -> None:
    expected = answer_of("user:hello;", 60)
    found = chat(service, "hello", stream_options={"include_usage": True})
    assert (found["content"], found["reason"], found["error"]) == (expected, "length", None)
    assert found["usage"]["completion_tokens"] == 60
    each = chat(service, "hello", stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert each["usage"]["completion_tokens"] == 60


def test_a_stream_survives_its_decode_engine(service: Service) -> None:
    thread, found = in_background(service.stream, max_tokens=150)
    before = kill(service, busy(service))
    thread.join(60)
    assert found["text"] == answer_of(PROMPT, 150)
    service.restarted(before)


@pytest.mark.parametrize("words", ["hello", "think first"])
def test_a_greedy_chat_is_repeated_elsewhere(service: Service, words: str) -> None:
    mock_names = names(service, "decode")
    for name in mock_names:
        mock(service, name).fault(die_after=40)
    found: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: found.update(chat(service, words)), daemon=True)
    thread.start()
    first = busy(service)
    other = next(name for name in mock_names if name != first)
    mock(service, other).fault()
    thread.join(60)
    expected = answer_of(f"user:{words};", 60)
    thoughts = 3 if words == "think first" else 0
    assert (found["reasoning_content"], found["content"]) == (expected[:thoughts], expected[thoughts:])
    assert (found["error"], found["reason"]) == (None, "length")


def test_a_chat_that_samples_ends_with_a_reason(service: Service) -> None:
    for name in names(service, "decode"):
        mock(service, name).fault(die_after=20)
    found = chat(service, "hello", temperature=1)
    assert "temperature 0" in found["error"]["message"]
    assert len(found["content"]) >= 1


def test_dead_prefills_end_neither_streams_nor_service(service: Service) -> None:
    thread, found = in_background(service.stream, max_tokens=150)
    busy(service)
    dead = [kill(service, name) for name in names(service, "prefill")]
    after = service.stream(PROMPT, max_tokens=10)
    thread.join(60)
    assert found["text"] == answer_of(PROMPT, 150)
    assert after["text"] == answer_of(PROMPT, 10)
    for before in dead:
        service.restarted(before)


def test_a_decode_that_dies_before_the_pull_leaves_no_kv_at_prefill(service: Service) -> None:
    first = names(service, "decode")[0]
    before = service.process(first)
    mock(service, first).fault(die_before_pull=True)
    prompts = [f"{PROMPT} to {number}" for number in range(6)]
    assert [service.stream(prompt, max_tokens=10)["text"] for prompt in prompts] == [answer_of(p, 10) for p in prompts]
    assert service.restarted(before).restarts > before.restarts
    # `clean` finds no room at any prefill, although they wait 600 s for a decode engine.


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_one_leg_that_fails_ends_the_other(service: Service, role: str) -> None:
    for name in names(service, role):
        mock(service, name).fault(status=500)
    assert service.stream(PROMPT, max_tokens=5)["text"] == answer_of(PROMPT, 5)
    aborted = [mock(service, process.name).told()["aborted"] for process in service.engines() if process.role != role]
    assert any(aborted), "the leg that waited was aborted by its rid"


def test_a_retracted_request_goes_on(service: Service) -> None:
    for name in names(service, "decode"):
        mock(service, name).fault(retract_after=5)
    thread, found = in_background(service.stream, max_tokens=12)
    thread.join(60)
    assert found["text"] == answer_of(PROMPT, 12)


def test_a_client_that_leaves_frees_both_legs(service: Service) -> None:
    for name in names(service, "decode"):
        mock(service, name).fault(never_match=True)
    body = {"prompt": PROMPT, "temperature": 0, "stream": True, "max_tokens": 50}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{service.url}/v1/completions", json=body, timeout=1.0, trust_env=False)
    wait_until(lambda: not any(mock(service, p.name).told()["running"] for p in service.engines()), 30, "aborts")


def test_clients_cannot_choose_rooms(service: Service) -> None:
    for name, value in (("bootstrap_room", 7), ("bootstrap_host", "2.2.2.2"), ("bootstrap_port", 1)):
        answer = service.client.post("/v1/completions", json={"prompt": PROMPT, name: value})
        assert answer.status_code == 400
        assert name in answer.json()["error"]["message"]
    body = {"prompt": PROMPT, "rid": "x", "max_tokens": 2}
    assert service.client.post("/v1/completions", json=body).status_code == 200
    assert "x" not in [rid for p in service.engines() for rid in mock(service, p.name).told()["aborted"]]


def test_the_plan_has_sglangs_own_options(service: Service) -> None:
    plan = json.loads(service.run.cli("plan", "--json", check=True).stdout)
    specs = [spec for spec in plan["processes"] if spec["kind"] == "sglang"]
    ports = [port for spec in specs for port in spec["ports"].values()]
    assert len(set(ports)) == len(ports) == 2 * 3 + 2 * 2, "http and nccl each, bootstrap at prefill"
    for spec in specs:
        assert spec["argv"][spec["argv"].index("--disaggregation-mode") + 1] == spec["role"]
        assert spec["env"]["SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT"] == str(LEASE_S)


# -- attached ----------------------------------------------------------------------------------------------


@contextmanager
def started(*modes: str) -> Iterator[dict[str, tuple[int, int]]]:
    """Mock engines that are not pdctl's: API and bootstrap port by mode. Their own waits end after 2 s."""
    ports = {mode: (free_port(), free_port()) for mode in modes}
    waits = {f"SGLANG_DISAGGREGATION_{name}_TIMEOUT": "2" for name in ("BOOTSTRAP", "WAITING")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.sglang.server", "--port", str(port), "--disaggregation-mode", mode,
             "--disaggregation-bootstrap-port", str(bootstrap)],
            env={**os.environ, **waits, "PYTHONPATH": str(REPOSITORY)},
        )
        for mode, (port, bootstrap) in ports.items()
    ]  # fmt: skip
    try:
        yield ports
    finally:
        for process in processes:
            process.kill()
            process.wait()


def attached(ports: dict[str, tuple[int, int]]) -> str:
    text = topology(prefills=0, decodes=0)
    roles = {"null": "hybrid"}
    for mode, (port, bootstrap) in ports.items():
        text += f'[[engines]]\nname = "{mode}"\nrole = "{roles.get(mode, mode)}"\nkind = "sglang"\n'
        text += f'url = "http://127.0.0.1:{port}"\n'
        if mode == "prefill":
            text += f"bootstrap_port = {bootstrap}\n"
    return text


def test_a_pair_that_never_meets_is_called_again() -> None:
    with started("prefill", "decode") as ports, temporary_run() as run, running(run, attached(ports)) as service:
        service.healthy()
        prefill, decode = (Mock(ports[mode][0]) for mode in ("prefill", "decode"))
        assert service.stream(PROMPT, max_tokens=5)["text"] == answer_of(PROMPT, 5)
        decode.fault(never_match=True)
        thread, found = in_background(service.stream, max_tokens=7)
        wait_until(lambda: prefill.told()["timeouts"] + decode.told()["timeouts"], 60, "the engines' own timeout")
        decode.fault()
        thread.join(60)
        assert found["text"] == answer_of(PROMPT, 7)
        wait_until(lambda: not prefill.told()["rooms"], 30, "no rooms")


def test_one_engine_alone_gets_no_room() -> None:
    with started("null") as ports, temporary_run() as run, running(run, attached(ports)) as service:
        service.healthy()
        assert service.stream(PROMPT, max_tokens=5)["text"] == answer_of(PROMPT, 5)
        assert service.complete(PROMPT, max_tokens=1)["text"] == answer_of(PROMPT, 1)
        assert Mock(ports["null"][0]).told()["requests"] == 2


def test_a_prefill_engine_is_never_asked_alone() -> None:
    with started("prefill", "decode") as ports, temporary_run() as run, running(run, attached(ports)) as service:
        service.healthy()
        assert service.stream(PROMPT, max_tokens=5)["text"] == answer_of(PROMPT, 5)
        Mock(ports["decode"][0]).fault(die_after=2)
        # Then only the prefill engine is left. The proxy waits for one that can decode; the client gives up first.
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{service.url}/v1/completions", json={"prompt": PROMPT}, timeout=3.0, trust_env=False)
        prefill = Mock(ports["prefill"][0])
        assert prefill.told()["without_room"] == 0, "it cannot compute alone"
        wait_until(prefill.is_idle, 30, "no rooms")


def test_a_run_names_its_options() -> None:
    with temporary_run() as run:
        python = environment(run.folder)
        extra = f'kind = "sglang"\ndevice = "cpu"\npython = "{python}"\nargs = ["--api-key", "x"]'
        run.write(topology(engine_extra=extra))
        done = Run.cli(run, "plan")
        assert done.returncode == 1
        assert "--api-key is set by pdctl" in done.stderr
