"""HTTP details on the proxy's and an engine's port: upgrades, large heads, half-closed connections, refusals."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import httpx
import pytest

from tests.service import Run, Service, running, single, wait_until

pytestmark = pytest.mark.e2e

BODY = json.dumps({"prompt": "x", "max_tokens": 3, "temperature": 0}).encode()


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    with running(module_run, single()) as found:
        yield found


@pytest.fixture(params=["proxy", "engine"])
def port(request: pytest.FixtureRequest, service: Service) -> int:
    name = "proxy" if request.param == "proxy" else "hybrid-0"
    return int(service.process(name).ports["http"])


def secret(service: Service) -> str:
    return (service.run.folder / "r" / "t" / "secret").read_text()


def head(service: Service, path: str, *lines: str, length: int = len(BODY)) -> bytes:
    fixed = [
        "host: x",
        "content-type: application/json",
        f"content-length: {length}",
        f"authorization: Bearer {secret(service)}",
    ]
    return "\r\n".join([f"POST {path} HTTP/1.1", *fixed, *lines, "", ""]).encode()


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=300)


def answer(client: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """The next final answer; interim ones are skipped."""
    with client.makefile("rb") as file:
        while True:
            status = int(file.readline().split()[1])
            headers = dict(line.decode().strip().lower().split(": ", 1) for line in iter(file.readline, b"\r\n"))
            if status >= 200:
                return status, headers, file.read(int(headers["content-length"]))


def error_of(body: bytes) -> dict[str, Any]:
    return dict(json.loads(body)["error"])


@pytest.mark.parametrize(
    "lines",
    [
        ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA"],
        ["Connection: Upgrade", "Upgrade: TLS/1.0"],
        ["Connection: upgrade", "Upgrade: websocket"],
    ],
    ids=["h2c", "tls", "websocket"],
)
@pytest.mark.parametrize("split", [0, 1, 60])
def test_an_upgrade_that_is_not_taken_is_ignored(service: Service, port: int, lines: list[str], split: int) -> None:
    sent = head(service, "/v1/completions", *lines) + BODY
    with connected(port) as client:
        for _ in range(2):  # and the connection still works
            if split:
                client.sendall(sent[:-split])
            client.sendall(sent[-split:] if split else sent)
            status, headers, body = answer(client)
            assert status == 200, body
            assert json.loads(body)["usage"]["completion_tokens"] == 3
            assert headers.get("connection") != "close"


@pytest.mark.parametrize("lines", [b"", b"connection: upgrade\r\nupgrade: x\r\n"], ids=["plain", "upgrade"])
def test_connect_is_refused(port: int, lines: bytes) -> None:
    with connected(port) as client:
        client.sendall(b"CONNECT other:443 HTTP/1.1\r\nhost: other\r\n" + lines + b"\r\n")
        status, headers, body = answer(client)
        assert (status, headers["connection"], error_of(body)["code"]) == (405, "close", 405)
        assert client.recv(1) == b""


def test_many_offers_in_one_read_are_all_ignored(service: Service, port: int) -> None:
    common = b"GET /nowhere HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\n" % secret(service).encode()
    one = common + b"connection: upgrade\r\nupgrade: x\r\n\r\n"
    last = common + b"connection: close\r\n\r\n"
    with connected(port) as client:
        client.sendall(one * 1200 + last)
        data = b"".join(iter(lambda: client.recv(65536), b""))
    assert data.count(b"HTTP/1.1 404 Not Found") == 1201


def test_curl_offers_http2(service: Service) -> None:
    import shutil
    import subprocess

    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    done = subprocess.run(
        ["curl", "-sS", "--http2", f"{service.url}/tokenize", "-d", '{"prompt": "ab"}'],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["count"] == 2


def test_a_client_that_shuts_down_its_sending_side_is_answered(service: Service, port: int) -> None:
    with connected(port) as client:
        client.sendall(head(service, "/v1/completions") + BODY)
        client.shutdown(socket.SHUT_WR)
        status, _, body = answer(client)
        assert status == 200
        assert json.loads(body)["usage"]["completion_tokens"] == 3
        assert client.recv(1) == b""


def test_pipelined_requests_before_the_end_of_sending_are_all_answered(service: Service, port: int) -> None:
    with connected(port) as client:
        client.sendall((head(service, "/v1/completions") + BODY) * 3)
        client.shutdown(socket.SHUT_WR)
        data = b"".join(iter(lambda: client.recv(65536), b""))
    assert data.count(b"HTTP/1.1 200 OK") == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_closes_is_noticed(service: Service, stream: bool) -> None:
    port = int(service.process("proxy").ports["http"])
    before = service.engine_state("hybrid-0")["tokens_total"]
    body = json.dumps({"prompt": "x", "max_tokens": 1800, "ignore_eos": True, "stream": stream}).encode()
    with connected(port) as client:
        client.sendall(head(service, "/v1/completions", length=len(body)) + body)
        wait_until(lambda: service.engine_state("hybrid-0")["running"] == 1, what="running")
    wait_until(lambda: service.engine_state("hybrid-0")["running"] == 0, what="given up")
    assert service.engine_state("hybrid-0")["tokens_total"] < before + 1800
    service.idle()


@pytest.mark.parametrize(
    "data", [b"hello\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01"]
)
def test_what_is_no_http_is_refused_in_openais_shape(port: int, data: bytes) -> None:
    with connected(port) as client:
        client.sendall(data)
        status, headers, body = answer(client)
        assert (status, headers["content-type"], headers["connection"]) == (400, "application/json", "close")
        assert error_of(body)["code"] == 400
        assert client.recv(1) == b""


@pytest.mark.parametrize("pieces", [1, 20])
def test_a_head_that_is_too_large_is_refused(port: int, pieces: int) -> None:
    line = b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 66_000 + b"\r\n\r\n"
    size = -(-len(line) // pieces)
    with connected(port) as client:
        for at in range(0, len(line), size):
            client.sendall(line[at : at + size])
        status, _, body = answer(client)
        assert status == 431
        assert error_of(body)["code"] == 431
    with connected(port) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 60_000 + b"\r\n\r\n")
        assert answer(client)[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("POST", "/health", 405), ("GET", "/v1/completions", 405), ("GET", "/tokenize", 405),
     ("POST", "/v1/completions", 400), ("POST", "/tokenize", 400), ("POST", "/detokenize", 400)],
)  # fmt: skip
def test_every_refusal_has_openais_shape(service: Service, port: int, method: str, path: str, status: int) -> None:
    key = {"authorization": f"Bearer {secret(service)}"}
    found = httpx.request(method, f"http://127.0.0.1:{port}{path}", content=b"{", headers=key, trust_env=False)
    assert found.status_code == status
    assert error_of(found.content)["code"] == status


def test_keep_alive_clients_meet_no_closed_connection_at_a_restart(service: Service) -> None:
    """Closed-loop clients, each with one keep-alive connection, while the proxy is restarted."""
    failures: list[str] = []
    stop = threading.Event()
    counts = [0] * 6

    def ask(number: int) -> None:
        with httpx.Client(base_url=service.url, timeout=300, trust_env=False) as client:
            while not stop.is_set():
                body = {"prompt": "x", "max_tokens": 2 + number, "stream": number % 2 == 1}
                try:
                    found = client.post("/v1/completions", json=body)
                except httpx.TransportError as failure:
                    failures.append(repr(failure))
                    return
                if found.status_code != 200:
                    failures.append(found.text)
                    return
                counts[number] += 1

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(len(counts))]
    for client in clients:
        client.start()

    def all_asked_since(before: list[int]) -> bool:
        return bool(failures) or all(now > then for now, then in zip(counts, before, strict=True))

    for _ in range(3):
        before = list(counts)
        service.run.cli("restart", "proxy", check=True)
        wait_until(partial(all_asked_since, before), what="answers")
    stop.set()
    for client in clients:
        client.join(60)
    assert not failures


def test_lists_of_one_key_do_not_hold_up_another_key(run: Run) -> None:
    """Two lists of 100 prompts need far more seats than there are; another key's request is still answered."""
    keys = {}
    for name in ("flood", "single"):
        made = run.cli("key", name, "--file", str(run.folder / "keys.txt"), check=True)
        keys[name] = {"authorization": f"Bearer {made.stdout.split()[0]}"}
    with running(run, single(extra='api_keys = "keys.txt"')) as found:
        body = {"prompt": [[5 + n] for n in range(100)], "max_tokens": 60, "ignore_eos": True, "temperature": 0}
        ends: list[str] = []

        def flood() -> None:
            answer = found.client.post("/v1/completions", json=body, headers=keys["flood"])
            assert answer.status_code == 200
            assert len(answer.json()["choices"]) == 100
            ends.append("flood")

        floods = [threading.Thread(target=flood) for _ in range(2)]
        for thread in floods:
            thread.start()
        wait_until(lambda: found.engine_state("hybrid-0")["running"] >= 28, what="seats taken")
        for _ in range(3):
            one = found.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 4}, headers=keys["single"])
            assert one.status_code == 200
            ends.append("single")
        for thread in floods:
            thread.join()
        assert ends == ["single"] * 3 + ["flood"] * 2


def test_prompts_of_one_request_do_not_share_random_numbers(service: Service) -> None:
    body = {"prompt": [[5], [5], [5]], "max_tokens": 16, "n": 2, "temperature": 1.5}
    texts = [choice["text"] for choice in service.client.post("/v1/completions", json=body).json()["choices"]]
    assert len(set(texts)) == 6
    seeded = {**body, "seed": 11}
    first, second = (service.client.post("/v1/completions", json=seeded).json()["choices"] for _ in range(2))
    assert first == second
    assert len({choice["text"] for choice in first}) == 6


def test_a_schema_that_answers_might_break_is_refused_through_the_proxy(service: Service) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    body = {"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}
    found = service.client.post("/v1/completions", json=body)
    assert found.status_code == 400
    error = error_of(found.content)
    assert error["param"] == "response_format"
    assert "json_schema.schema.properties.a.uniqueItems: 'uniqueItems' is not supported" in error["message"]


def test_a_text_that_can_never_fit_costs_nothing(service: Service) -> None:
    for path, body in (
        ("/tokenize", {"prompt": "word " * 3_000_000}),
        ("/v1/completions", {"prompt": "word " * 3_000_000}),
        ("/detokenize", {"tokens": [5] * 3_000_000}),
    ):
        found = service.client.post(path, json=body)
        assert found.status_code == 400, found.text
    for path, body, param in (
        ("/tokenize", {"prompt": "x", "model": "other"}, "model"),
        ("/detokenize", {"tokens": [100_000]}, "tokens"),
    ):
        found = service.client.post(path, json=body)
        assert error_of(found.content)["param"] == param
