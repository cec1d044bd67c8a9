"""kill -9 of any process: it is restarted, clients keep their answers, no block stays leased, the cause is reported."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil
import pytest

from tests.service import Run, Service, events, last_exit_of, pid_of, running, single, topology, wait_until

pytestmark = pytest.mark.e2e

PROMPT = "The quick brown fox jumps over the lazy dog. " * 8
LONG = 400


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    with running(module_run, topology()) as found:
        yield found


@pytest.fixture(scope="module")
def quiet(service: Service) -> dict[str, Any]:
    """The answers of a run without faults."""
    return service.complete(PROMPT, max_tokens=LONG, ignore_eos=True)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("name", ["decode-0", pytest.param("prefill-0", marks=pytest.mark.slow), "proxy"])
def test_idle_process_is_restarted_and_says_why(service: Service, quiet: dict[str, Any], name: str) -> None:
    service.healthy()
    before = service.process(name)
    kill(pid_of(before))
    after = service.restarted(before)
    assert after.restarts == before.restarts + 1
    assert last_exit_of(after).signal == "SIGKILL"
    assert last_exit_of(after).reason == "killed by SIGKILL"
    assert "killed by SIGKILL" in service.run.cli("status").stdout
    service.healthy()
    assert service.complete(PROMPT, max_tokens=LONG, ignore_eos=True)["token_ids"] == quiet["token_ids"]
    service.idle()


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
@pytest.mark.parametrize("part", [pytest.param("front", marks=pytest.mark.slow), "core"])
def test_stream_survives_the_death_of_an_engine(
    service: Service, quiet: dict[str, Any], victim: str, part: str
) -> None:
    service.healthy()
    before = service.process(victim)

    def kill_it() -> None:
        kill(pid_of(before) if part == "front" else psutil.Process(before.pid).children()[0].pid)

    found = service.stream(PROMPT, kill_it, max_tokens=LONG, ignore_eos=True)
    assert found["token_ids"] == quiet["token_ids"]
    assert found["text"] == quiet["text"]
    service.restarted(before)
    service.healthy()
    service.idle()


def test_seeded_stream_survives_too(service: Service) -> None:
    options = {"max_tokens": LONG, "temperature": 0.9, "top_p": 0.95, "seed": 7, "ignore_eos": True}
    quiet = service.complete(PROMPT, **options)
    assert len(set(quiet["token_ids"])) > 20
    before = service.process("decode-0")
    timer = threading.Timer(0.3, kill, [pid_of(before)])
    timer.start()
    got = service.stream(PROMPT, **options)
    timer.join()
    assert got["token_ids"] == quiet["token_ids"]
    assert got["text"] == quiet["text"]
    service.restarted(before)
    service.healthy()
    service.idle()


def test_no_connection_is_refused_while_the_proxy_is_dead(service: Service) -> None:
    before = service.process("proxy")
    kill(pid_of(before))
    # The supervisor holds the listening socket: this request waits in its backlog for the new proxy.
    with httpx.Client(base_url=service.url, timeout=300, trust_env=False) as client:
        body = {"prompt": "hello", "max_tokens": 4, "temperature": 0}
        assert client.post("/v1/completions", json=body).status_code == 200
    service.restarted(before)


def test_a_frozen_holder_loses_its_lease_in_time(run: Run) -> None:
    """SIGSTOP of a decode engine with leases: the supervisor sees no death, so the deadline frees the blocks."""
    with running(run, topology(lease_s=2)) as service:
        decode = pid_of(service.process("decode-0"))
        core = psutil.Process(decode).children()[0].pid
        os.kill(core, signal.SIGSTOP)  # the front is alive and claims leases, but blocks are never reserved
        body = json.dumps({"prompt": PROMPT, "max_tokens": 8, "temperature": 0}).encode()
        host, _, port = service.url.removeprefix("http://").rpartition(":")
        with socket.create_connection((host, int(port))) as asker:
            asker.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            wait_until(lambda: service.engine_state("prefill-0")["leases"], what="a lease")
            asker.setblocking(False)
            with pytest.raises(BlockingIOError):
                asker.recv(1)
        wait_until(lambda: not service.engine_state("prefill-0")["leases"], what="the lease to end")
        state = service.engine_state("prefill-0")
        assert state["blocks_free"] == state["blocks_total"]
        os.kill(core, signal.SIGCONT)
        service.idle()


@pytest.mark.slow
def test_no_orphan_survives_the_supervisor(run: Run) -> None:
    run.write(topology())
    run.cli("up", "-d", check=True)
    status = Service(run)
    status.client.close()
    assert len(run.processes()) >= 6, "supervisor, proxy, two fronts, two cores"
    kill(status.status().supervisor_pid)
    wait_until(lambda: not run.processes(), what="every process to end")
    # The next `up` cleans up after the dead one.
    run.cli("up", "-d", check=True)
    assert run.cli("ask", "hello", "--max-tokens", "4").returncode == 0
    run.cli("down", check=True)
    assert not run.processes()


def test_disconnect_frees_both_engines(service: Service) -> None:
    service.healthy()
    body = {"prompt": PROMPT, "max_tokens": 1500, "temperature": 0, "stream": True, "ignore_eos": True}
    with service.client.stream("POST", "/v1/completions", json=body) as answer:
        stream = events(answer)
        for _ in range(5):
            next(stream)
        running_now = service.engine_state("decode-0")
        assert running_now["running"] == 1
        assert running_now["blocks_free"] < running_now["blocks_total"]
    service.idle()
    assert service.engine_state("decode-0")["running"] == 0
    assert service.engine_state("prefill-0")["running"] == 0


def test_disconnect_during_prefill_frees_it(service: Service) -> None:
    service.healthy()
    body = {"prompt": "x" * 1900, "max_tokens": 100, "temperature": 0}
    for wait in (0.02, 0.05, 0.1, 0.2):
        with pytest.raises(httpx.TimeoutException):
            httpx.post(
                f"{service.url}/v1/completions",
                json=body,
                timeout=httpx.Timeout(5, read=wait),
                trust_env=False,
            )
    service.idle()


def stream_with(service: Service, at: int, act: Callable[[], None]) -> list[int]:
    """The token ids of a long stream; an action runs once while it streams."""
    return list(service.stream(PROMPT, act, at, max_tokens=LONG, ignore_eos=True)["token_ids"])


def test_stream_survives_the_death_of_both_engines_at_once(service: Service, quiet: dict[str, Any]) -> None:
    service.healthy()
    before = {name: service.process(name) for name in ("prefill-0", "decode-0")}

    def kill_both() -> None:
        for process in before.values():
            kill(pid_of(process))

    assert stream_with(service, 20, kill_both) == quiet["token_ids"]
    for process in before.values():
        service.restarted(process)
    service.healthy()
    service.idle()


def test_engines_killed_together_have_not_died_of_a_request(service: Service, quiet: dict[str, Any]) -> None:
    """Prefill is effectively dead when decode dies, but still accepts requests: frozen here; on a busy machine, killed
    but not yet gone. Its death does not count against the request that continues there."""
    service.healthy()
    before = {name: service.process(name) for name in ("prefill-0", "decode-0")}
    late = threading.Timer(1.0, kill, [pid_of(before["prefill-0"])])

    def kill_both() -> None:
        os.kill(pid_of(before["prefill-0"]), signal.SIGSTOP)
        kill(pid_of(before["decode-0"]))
        late.start()

    assert stream_with(service, 20, kill_both) == quiet["token_ids"]
    late.join()
    for process in before.values():
        service.restarted(process)
    service.healthy()
    service.idle()


def test_stream_leaves_a_frozen_engine(service: Service, quiet: dict[str, Any]) -> None:
    service.healthy()
    pid = pid_of(service.process("decode-0"))
    try:
        ids = stream_with(service, 20, lambda: os.kill(pid, signal.SIGSTOP))
    finally:
        os.kill(pid, signal.SIGCONT)
    assert ids == quiet["token_ids"]
    service.healthy()
    service.idle()


@pytest.mark.slow
def test_a_frozen_proxy_blames_no_engine(service: Service, quiet: dict[str, Any]) -> None:
    service.healthy()
    before = service.process("proxy")
    thaw = threading.Timer(7.0, os.kill, [pid_of(before), signal.SIGCONT])

    def freeze() -> None:
        os.kill(pid_of(before), signal.SIGSTOP)
        thaw.start()

    assert stream_with(service, 20, freeze) == quiet["token_ids"]
    thaw.join()
    assert service.process("proxy").epoch == before.epoch
    assert "produced no token" not in service.run.cli("logs", "proxy", check=True).stdout
    service.idle()


@pytest.mark.slow
def test_a_frozen_orphan_of_another_topology_is_ended_by_the_next_start(run: Run) -> None:
    run.write(topology(prefills=2))
    run.cli("up", "-d", check=True)
    service = Service(run)
    service.client.close()
    frozen = pid_of(service.process("prefill-1"))
    os.kill(frozen, signal.SIGSTOP)  # SIGTERM stays pending until the process is resumed
    kill(service.status().supervisor_pid)
    wait_until(lambda: len(run.processes()) <= 2, what="all but the frozen engine to end")
    assert psutil.pid_exists(frozen)
    with running(run, topology()):
        wait_until(lambda: not psutil.pid_exists(frozen), what="the orphan to be ended")


def test_an_engine_that_dies_while_the_service_stops_stays_down(run: Run) -> None:
    run.write(single())
    run.cli("up", "-d", check=True)
    service = Service(run)
    service.client.close()
    proxy, decode = pid_of(service.process("proxy")), pid_of(service.process("hybrid-0"))
    os.kill(proxy, signal.SIGSTOP)  # delays the stop
    stopper = threading.Thread(target=run.cli, args=("down",))
    stopper.start()
    wait_until(lambda: service.status().state == "stopping", what="the stop to begin")
    kill(decode)
    wait_until(lambda: service.process("hybrid-0").state == "stopped", what="decode to be down for good")
    os.kill(proxy, signal.SIGCONT)
    stopper.join()
    assert not run.processes()


def test_a_frozen_core_behind_a_front_that_answers_is_found_and_replaced(run: Run) -> None:
    """The front answers 200 to everything; the progress probe detects that the step loop does not run."""
    text = single(kv_cache_gb=0.1).replace("[supervisor]", "[supervisor]\nprogress_s = 3\nliveness_s = 0.5")
    with running(run, text) as service:
        before = service.process("hybrid-0")
        core = psutil.Process(before.pid).children()[0]
        core.suspend()
        after = service.restarted(before)
        assert after.restarts == 1
        told = run.cli("why", "hybrid-0", check=True).stdout
        assert "hung: its core has not answered for" in told
        assert service.complete(PROMPT, max_tokens=4)["token_ids"]
