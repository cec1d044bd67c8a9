"""The proxy alone, with scripted fake engines: limits, refusals, failures, logs and traces."""

from __future__ import annotations

import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.collector import Collector, collector
from tests.service import Run, Service, events, free_port, pid_of, running, wait_until

pytestmark = pytest.mark.e2e

WORKER = Path(__file__).parents[1] / "fakes" / "vllm_worker.py"


class Worker:
    """One fake engine in its own process."""

    def __init__(self, role: str, number: int) -> None:
        self.name, self.role, self.port = f"{role}{number}", role, free_port()
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen([sys.executable, str(WORKER), str(self.port)])

    def stats(self) -> dict[str, Any]:
        return dict(httpx.get(f"http://127.0.0.1:{self.port}/stats", trust_env=False).json())

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def toml(self) -> str:
        return f"""
[[engines]]
name = "{self.name}"
role = "{self.role}"
kind = "vllm"
url = "http://127.0.0.1:{self.port}"
"""


def text(workers: list[Worker], proxy: str = "", rest: str = "") -> str:
    head = f'[service]\nname = "t"\nmodel = "m"\n[proxy]\nport = {free_port()}\n{proxy}\n{rest}\n'
    return head + "".join(worker.toml() for worker in workers)


@contextmanager
def fleet(run: Run, prefills: int = 1, decodes: int = 1, **more: str) -> Iterator[tuple[Service, list[Worker]]]:
    with ExitStack() as stack:
        workers = [Worker("prefill", n) for n in range(prefills)] + [Worker("decode", n) for n in range(decodes)]
        for worker in workers:
            stack.callback(worker.stop)
        service = stack.enter_context(running(run, text(workers, **more)))
        service.healthy()
        yield service, workers


def complete(service: Service, prompt: str = "x", **more: Any) -> httpx.Response:
    return service.client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 8, **more})


def streamed(service: Service, prompt: str, max_tokens: int = 8) -> str:
    body = {"prompt": prompt, "max_tokens": max_tokens, "stream": True}
    shown = ""
    with service.client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        for event in events(answer):
            if event is None:
                return shown
            assert "error" not in event, event
            assert "token_ids" not in event["choices"][0], "the client did not ask for them"
            shown += event["choices"][0]["text"]
    raise AssertionError("no [DONE]")


def ended(workers: list[Worker]) -> int:
    """Workers with exited processes. Their connections may close a moment earlier."""
    return sum(worker.process.poll() is not None for worker in workers)


def counting(count: int) -> str:
    return "".join(f" {n}" for n in range(count))


# -- one service for what needs no fault -------------------------------------------------------------------


@pytest.fixture(scope="module")
def spans() -> Iterator[Collector]:
    with collector() as found:
        yield found


@pytest.fixture(scope="module")
def quiet(module_run: Run, spans: Collector) -> Iterator[tuple[Service, list[Worker]]]:
    proxy = f'access_log = "access.jsonl"\nmax_body_mb = 1\notlp_endpoint = "{spans.endpoint}"'
    with fleet(module_run, proxy=proxy) as found:
        yield found


def test_attached_engines_are_used_and_shown(quiet: tuple[Service, list[Worker]]) -> None:
    service, workers = quiet
    assert complete(service).json()["choices"][0]["text"] == counting(8)
    assert streamed(service, "x") == counting(8)
    assert [worker.stats()["requests"] > 0 for worker in workers] == [True, True]
    shown = service.run.cli("status").stdout
    assert "prefill0" in shown
    assert "answers" in shown
    assert service.client.get("/ready").status_code == 200
    planned = service.run.cli("plan").stdout
    assert f"127.0.0.1:{workers[0].port}" in planned


def test_the_access_log_and_the_timing_header(quiet: tuple[Service, list[Worker]]) -> None:
    service, _ = quiet
    headers = {"x-request-id": "log-me", "x-pdctl-timing": "1"}
    answer = service.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 4}, headers=headers)
    assert answer.headers["x-request-id"] == "log-me"
    assert "queue;dur=" in answer.headers["x-pdctl-timing"]
    assert re.search(r"prefill;dur=[0-9.]+;desc=prefill0,", answer.headers["x-pdctl-timing"])
    assert answer.headers["x-pdctl-timing"].endswith("decode;desc=decode0")
    one = service.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers=headers)
    assert one.headers["x-pdctl-timing"].endswith("decode;desc=prefill0"), "who really made the only token"
    log = service.run.folder / "access.jsonl"

    def line() -> dict[str, Any] | None:
        found = [json.loads(raw) for raw in log.read_text().splitlines()]
        return next((entry for entry in found if entry["request_id"] == "log-me"), None)

    entry = wait_until(line, what="the line")
    assert (entry["status"], entry["output_tokens"], entry["prefill_engine"], entry["decode_engine"]) == (
        200,
        4,
        "prefill0",
        "decode0",
    )
    complete(service, n=0)
    wait_until(lambda: any('"status":400' in raw for raw in log.read_text().splitlines()), what="the refusal's line")


def test_spans_and_trace_context_go_on(quiet: tuple[Service, list[Worker]], spans: Collector) -> None:
    service, workers = quiet
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    service.client.post("/v1/completions", json={"prompt": "x"}, headers=headers)
    given = [worker.stats()["headers"]["traceparent"].split("-") for worker in workers]
    names = {"pdctl.request", "queue", "prefill", "decode"}
    wait_until(lambda: names == {span.name for span in spans.of(trace)}, what="the spans")
    ids = {span.name: span.id for span in spans.of(trace)}
    assert [(context[1], context[2]) for context in given] == [(trace, ids["prefill"]), (trace, ids["decode"])]


def test_bodies_that_are_too_large_or_broken(quiet: tuple[Service, list[Worker]]) -> None:
    service, _ = quiet
    large = b'{"prompt": "' + b"x" * 2**20 + b'"}'
    assert service.client.post("/v1/completions", content=large).status_code == 413
    assert service.client.post("/v1/completions", content=iter([large])).status_code == 413, "of unknown length, too"
    assert service.client.post("/v1/completions", content=b'{"prompt": "\xff\xfe"}').status_code == 400
    assert service.client.get("/v1/completions").status_code == 405
    assert service.client.get("/nothing").json()["error"]["code"] == 404


def raw(service: Service, data: bytes, shut: bool = False) -> bytes:
    host, _, port = service.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=300) as connection:
        connection.sendall(data)
        if shut:
            connection.shutdown(socket.SHUT_WR)
        got = b""
        while part := connection.recv(65536):
            got += part
        return got


def request(prompt: str, close: bool = False, stream: bool = False, version: str = "1.1", max_tokens: int = 3) -> bytes:
    body = json.dumps({"prompt": prompt, "max_tokens": max_tokens, "stream": stream}).encode()
    end = "connection: close\r\n" if close else ""
    head = f"POST /v1/completions HTTP/{version}\r\nhost: x\r\ncontent-length: {len(body)}\r\n{end}\r\n"
    return head.encode() + body


def test_pipelined_requests_are_answered_in_order(quiet: tuple[Service, list[Worker]]) -> None:
    service, _ = quiet
    got = raw(service, request("slow") + request("x", stream=True) + request("x", close=True))
    assert got.count(b"HTTP/1.1 200 OK") == 3
    assert got.index(b"text/event-stream") > got.index(b"application/json")


def test_http_1_0_gets_no_chunks(quiet: tuple[Service, list[Worker]]) -> None:
    service, _ = quiet
    got = raw(service, request("x", stream=True, version="1.0"))
    assert got.endswith(b"data: [DONE]\n\n")
    assert b"transfer-encoding" not in got


@pytest.mark.parametrize(
    "data", [b"GARBAGE\r\n\r\n", b"GET / HTTP/1.1\r\nbad header\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n"]
)
def test_what_is_not_http_is_refused(quiet: tuple[Service, list[Worker]], data: bytes) -> None:
    assert raw(quiet[0], data, shut=True).startswith(b"HTTP/1.1 400") or not raw(quiet[0], data, shut=True)


def test_endless_headers_are_refused(quiet: tuple[Service, list[Worker]]) -> None:
    got = raw(quiet[0], b"GET /health HTTP/1.1\r\n" + b"".join(b"h%d: %s\r\n" % (n, b"x" * 1000) for n in range(200)))
    assert got.startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize("stage", ["head", "body", "whole", "stream", "half-closed"])
def test_whoever_leaves_frees_both_engines(quiet: tuple[Service, list[Worker]], stage: str) -> None:
    service, workers = quiet
    host, _, port = service.url.removeprefix("http://").rpartition(":")
    # The answer would take 50 minutes: engines that are free earlier were told to abort it.
    data = request("slow", stream=stage in ("stream", "half-closed"), max_tokens=100_000)
    cut = {"head": 20, "body": len(data) - 5}.get(stage, len(data))
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(data[:cut])
        if cut == len(data):
            wait_until(lambda: any(worker.stats()["open"] for worker in workers), what="the request to be under way")
        if stage == "half-closed":
            connection.shutdown(socket.SHUT_WR)
    wait_until(lambda: not any(worker.stats()["open"] for worker in workers), what="the engines to be free")
    assert complete(service).status_code == 200


def test_openapi_and_promtool(quiet: tuple[Service, list[Worker]]) -> None:
    service, _ = quiet
    described = service.client.get("/openapi.json").json()
    assert described["openapi"].startswith("3.1")
    metrics = service.client.get("/metrics").text
    assert "pdctl_proxy_ttft_seconds_bucket" in metrics
    assert "vllm:time_to_first_token_seconds_bucket" in service.client.get("/metrics/vllm").text
    import shutil

    if shutil.which("promtool"):
        done = subprocess.run(["promtool", "check", "metrics"], input=metrics, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr


# -- services with faults ----------------------------------------------------------------------------------


def test_a_stalled_engine_is_left_before_tcp_notices(run: Run) -> None:
    with fleet(run, decodes=2) as (service, _):
        # The decode engine that gets it stalls after three tokens; the continuation is another prompt and does not.
        assert streamed(service, "stall", 12) == counting(12)
        # Detected because all its streams are silent, long before a single call's timeout.
        assert "produced no token on any stream" in run.cli("logs", "proxy").stdout
        assert complete(service).status_code == 200


@pytest.mark.parametrize("with_ids", [False, True])
def test_a_stream_cut_within_a_character_goes_on_and_stays_one_answer(run: Run, with_ids: bool) -> None:
    with fleet(run, decodes=2) as (service, workers):
        body = {"prompt": "half", "max_tokens": 12, "stream": True, "return_token_ids": with_ids, "temperature": 0}
        with service.client.stream("POST", "/v1/completions", json=body) as answer:
            found = [event for event in events(answer) if event is not None]
            name = answer.headers["x-request-id"]
        assert not any("error" in event for event in found), found
        assert "".join(event["choices"][0]["text"] for event in found) == counting(12)
        wait_until(lambda: ended(workers) == 1, what="the end of the engine that died meanwhile")
        assert {event["id"] for event in found} == {f"cmpl-{name}"}
        assert len({(event["created"], event["system_fingerprint"]) for event in found}) == 1
        if with_ids:
            assert [token for event in found for token in event["choices"][0]["token_ids"]] == list(range(12))


def test_a_model_has_the_time_it_was_made_here(quiet: tuple[Service, list[Worker]]) -> None:
    service, _ = quiet
    [card] = service.client.get("/v1/models").json()["data"]
    assert card == service.client.get("/v1/models/m").json()
    assert 0 <= time.time() - card["created"] < 3600


def test_killed_engines_are_used_again_at_once(run: Run) -> None:
    with fleet(run, prefills=2, decodes=2) as (service, workers), ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(streamed, service, "slow", 40) for _ in range(16)]
        victim = workers[-1]
        wait_until(lambda: victim.stats()["open"] > 0, what="a stream at the one that is stopped")
        victim.stop()
        assert all(answer.result() == counting(40) for answer in answers)
        assert all(complete(service).status_code == 200 for _ in range(60))
        victim.start()
        wait_until(lambda: service.client.get("/ready").status_code == 200, what="it to be back")
        for _ in range(8):
            complete(service)
        assert victim.stats()["requests"] > 0


def test_poison_is_not_walked_through_the_fleet(run: Run) -> None:
    with fleet(run, prefills=4) as (service, workers):
        answer = complete(service, "poison")
        assert answer.status_code == 422
        assert answer.json()["error"]["type"] == "request_quarantined"
        wait_until(lambda: ended(workers) >= 2, what="two deaths")
        assert complete(service, "poison").status_code == 422
        assert complete(service, "x").status_code == 200
        assert ended(workers) == 2, "two engines died, not four, and it is remembered"


def test_an_engine_that_fails_everything_is_left_out(run: Run) -> None:
    with fleet(run) as (service, _):
        answer = complete(service, "busy")
        assert answer.status_code == 502
        assert "busy" in answer.json()["error"]["message"]
        wait_until(lambda: complete(service).status_code == 200, what="the trial that closes the circuit")


def test_overload_is_refused_with_the_time_to_come_back(run: Run) -> None:
    with fleet(run, proxy='admission = "slo"\nmax_queue = 4', rest="[slo]\nttft_ms = 300\ntpot_ms = 20") as (
        service,
        _,
    ):
        with ThreadPoolExecutor(64) as pool:
            # 30 ms per token misses the target of 20 ms: seats are reduced until few are left.
            found = [pool.submit(complete, service, "slow") for _ in range(300)]
            observed = Counter(answer.result().status_code for answer in found)
        assert set(observed) == {200, 429}
        refused = next(a.result() for a in found if a.result().status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_exceeded"
        metrics = service.client.get("/metrics").text
        assert "pdctl_proxy_sheds_total" in metrics
        assert complete(service).status_code == 200


def test_several_workers_are_one_service(run: Run) -> None:
    with fleet(run, decodes=2, proxy="workers = 2") as (service, _):
        proxies = [p for p in service.status().processes if p.kind == "proxy"]
        assert [p.name for p in proxies] == ["proxy-0", "proxy-1"]

        def once(_: int) -> bool:
            with httpx.Client(base_url=service.url, trust_env=False, timeout=300) as client:
                return client.post("/v1/completions", json={"prompt": "x", "max_tokens": 4}).status_code == 200

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(once, range(40)))

        def counted() -> int:
            lines = service.client.get("/metrics").text.splitlines()
            found = [line for line in lines if line.startswith('pdctl_proxy_requests_total{status="200"}')]
            return int(float(found[0].split()[-1])) if found else 0

        wait_until(lambda: counted() == 40, what="all workers' requests in one worker's metrics")
        import os

        os.kill(pid_of(proxies[0]), signal.SIGKILL)
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(once, range(20))), "the other one takes over, and nobody is refused"
        service.wait(lambda: service.process("proxy-0").pid not in (None, proxies[0].pid), what="proxy-0 again")


def test_tls_and_cors(run: Run) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "cert.pem", "-days",
         "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        cwd=run.folder, check=True, capture_output=True,
    )  # fmt: skip
    options = 'tls_cert = "cert.pem"\ntls_key = "key.pem"\ncors_origins = ["https://my.page"]'
    worker_list = [Worker("prefill", 0), Worker("decode", 0)]
    try:
        with running(run, text(worker_list, options)) as service:
            assert service.url.startswith("https://")
            context = ssl.create_default_context(cafile=str(run.folder / "cert.pem"))
            with httpx.Client(base_url=service.url, verify=context, trust_env=False) as client:
                wait_until(lambda: client.get("/health").status_code == 200, what="the proxy")
                origin = {"origin": "https://my.page"}
                answer = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 4}, headers=origin)
                assert answer.json()["choices"][0]["text"] == counting(4)
                assert answer.headers["access-control-allow-origin"] == "https://my.page"
                other = client.post("/v1/completions", json={"prompt": "x"}, headers={"origin": "https://evil"})
                assert "access-control-allow-origin" not in other.headers
            asked = run.cli("ask", "x", "--max-tokens", "3")
            assert asked.returncode == 0, asked.stderr
            assert asked.stdout.strip() == counting(3).strip()
    finally:
        for worker in worker_list:
            worker.stop()
