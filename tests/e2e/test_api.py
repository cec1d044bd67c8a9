"""The proxy's API with real engines: correct answers, correct errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.service import Run, Service, events, running, single, topology

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    with running(module_run, topology(engine_extra="max_num_batched_tokens = 64")) as found:
        yield found


@pytest.fixture(autouse=True)
def nothing_left(service: Service) -> Iterator[None]:
    yield
    service.idle()


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b'{"prompt": "x", "max_tokens": -1}', 400, "max_tokens"),
        (b'{"prompt": "x", "max_tokens": 1.5}', 400, "max_tokens"),
        (b'{"prompt": ', 400, "not valid JSON"),
        (b"", 400, "not valid JSON"),
        (b"\xff\xfe", 400, "not valid JSON"),
        (b'{"prompt": "x", "model": "other"}', 404, "does not exist"),
        (b'{"prompt": "x", "kv_transfer_params": {"do_remote_decode": true}}', 400, "own processes"),
        (b'{"prompt": "x", "resume_token_ids": [1]}', 400, "own processes"),
        (b'{"prompt": []}', 400, "empty"),
        (b'{"prompt": [1, 99999]}', 400, "token ids"),
        (b'{"prompt": "x", "max_tokens": 100000}', 400, "context is 2048"),
        (b'{"prompt": "x", "stream": false, "stream_options": {}}', 400, "stream_options"),
        (b'{"prompt": "x", "n": 0}', 400, "n must be"),
        (b'{"prompt": "x", "n": 1000}', 400, "n must be"),
        (b'{"prompt": "x", "best_of": 3}', 400, "best_of"),
        (json.dumps({"prompt": "x" * 2500}).encode(), 400, "context is 2048"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests(service: Service, body: bytes, status: int, words: str, stream: bool) -> None:
    if stream and body.endswith(b"}") and b'"stream"' not in body:
        body = body[:-1] + b', "stream": true}'
    answer = service.client.post("/v1/completions", content=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


def test_chat_on_a_base_model_is_a_clear_400(service: Service) -> None:
    answer = service.client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
    assert answer.status_code == 400
    assert "base model" in answer.json()["error"]["message"]


def test_other_paths_and_methods(service: Service) -> None:
    assert service.client.get("/v1/completions").status_code == 405
    for path in ("/nowhere", "/v1/models/other"):
        answer = service.client.get(path)
        assert answer.status_code == 404
        assert path.split("/")[-1] in answer.json()["error"]["message"]
    assert service.client.get("/v1/models/m").json()["id"] == "m"
    assert service.client.get("/v1/models").json()["data"][0]["id"] == "m"
    assert service.client.get("/health").json()["ok"] is True


def test_a_body_too_large(service: Service) -> None:
    answer = service.client.post("/v1/completions", content=b'{"prompt": "' + b"x" * (17 * 2**20) + b'"}')
    assert answer.status_code == 413


def test_request_ids_go_through(service: Service) -> None:
    answer = service.client.post(
        "/v1/completions", json={"prompt": "x", "max_tokens": 2}, headers={"x-request-id": "abc-1"}
    )
    assert answer.headers["x-request-id"] == "abc-1"
    assert answer.json()["id"] == "cmpl-abc-1"


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_lengths_and_usage(service: Service, tokens: int) -> None:
    whole = service.complete("hello", max_tokens=tokens)
    streamed = service.stream("hello", max_tokens=tokens)
    assert len(whole["token_ids"]) == tokens
    assert whole["usage"] == {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 5 + tokens}
    assert {k: whole[k] for k in ("text", "token_ids", "finish_reason")} == streamed
    assert whole["finish_reason"] == "length"


def test_stream_usage_and_ids_are_the_same_all_through(service: Service) -> None:
    body = {
        "prompt": "hello",
        "max_tokens": 6,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with service.client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        observed = [event for event in events(answer) if event is not None]
    assert len({event["id"] for event in observed}) == 1
    assert observed[-1]["usage"]["completion_tokens"] == 6
    assert observed[-1]["choices"] == []
    assert all("token_ids" not in choice for event in observed for choice in event["choices"])


def test_stop_strings_at_every_place(service: Service) -> None:
    """A stop string may end on the prefill token, on decode's first token, or later, and may span tokens."""
    full = service.complete("hello", max_tokens=24)["text"]
    for start in (0, 1, 2, 5, 8):
        stop = full[start : start + 2]
        expected = full[: full.index(stop)]
        for ask in (service.complete, service.stream):
            found = ask("hello", max_tokens=24, stop=[stop])
            assert found["text"] == expected
            assert found["finish_reason"] == "stop"


def test_seeds_decide(service: Service) -> None:
    options = {"max_tokens": 32, "temperature": 1.0}
    first = service.complete("hello", seed=1, **options)["token_ids"]
    assert service.stream("hello", seed=1, **options)["token_ids"] == first
    assert service.complete("hello", seed=2, **options)["token_ids"] != first
    assert service.complete("hello", **options)["token_ids"] != service.complete("hello", **options)["token_ids"]


def test_engines_keep_their_internal_doors_shut(service: Service) -> None:
    port = service.process("prefill-0").ports["http"]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as engine:
        for headers in ({}, {"authorization": "Bearer"}, {"authorization": "Bearer wrong"}):
            lease = {"lease_id": "x", "epoch": "y", "holder": "z"}
            for verb in ("claim", "commit", "release"):
                assert engine.post(f"/pdctl/v1/leases/{verb}", json=lease, headers=headers).status_code == 401
            assert engine.post("/pdctl/v1/holders/release", json={"holder": "z"}, headers=headers).status_code == 401
            for more in ({}, {"kv_transfer_params": {"do_remote_decode": True}}):
                answer = engine.post("/v1/completions", json={"prompt": "x", **more}, headers=headers)
                assert answer.status_code == 401, "past the proxy's keys and limits"
                assert answer.json()["error"]["type"] == "authentication_error"
            for path in ("/metrics", "/v1/models", "/pdctl/v1/state", "/pdctl/v1/endpoint", "/nowhere"):
                assert engine.get(path, headers=headers).status_code == 401
            assert engine.get("/health", headers=headers).status_code == 200
        assert engine.get("/metrics", headers=service.internal).status_code == 200


def test_an_open_engine_serves_everybody_but_for_its_internal_doors(run: Run) -> None:
    with running(run, single(engine_extra="open = true")) as service:
        port = service.process("hybrid-0").ports["http"]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as engine:
            assert engine.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
            assert engine.get("/metrics").status_code == 200
            assert engine.post("/pdctl/v1/holders/release", json={"holder": "z"}).status_code == 403
            assert engine.post("/v1/completions", json={"prompt": "x", "resume_token_ids": [1]}).status_code == 403
            # Routers of other projects may have it hold KV (test_open_engines), but not read from where they like.
            body = {"prompt": "x", "kv_transfer_params": {"do_remote_decode": True}}
            params = engine.post("/v1/completions", json=body).json()["kv_transfer_params"]
            for forged in ({**params, "seal": ""}, {**params, "remote_host": "127.0.0.2"}):
                answer = engine.post("/v1/completions", json={"prompt": "x", "kv_transfer_params": forged})
                assert answer.status_code == 403


def secret_of(service: Service) -> dict[str, str]:
    import psutil

    secret = psutil.Process(service.process("prefill-0").pid).environ()["PDCTL_SECRET"]
    return {"authorization": f"Bearer {secret}"}


def test_hand_overs_that_are_wrong_are_refused_and_harm_nobody(service: Service) -> None:
    headers = secret_of(service)
    urls = {name: f"http://127.0.0.1:{service.process(name).ports['http']}" for name in ("prefill-0", "decode-0")}

    def prefill(prompt: str) -> dict[str, object]:
        body = {
            "prompt": prompt,
            "temperature": 0,
            "max_tokens": 4,
            "kv_transfer_params": {"do_remote_decode": True},
        }
        answer = httpx.post(
            f"{urls['prefill-0']}/v1/completions", json=body, headers=headers, timeout=300, trust_env=False
        )
        return dict(answer.json()["kv_transfer_params"])

    def decode(prompt: str, hand_over: object) -> httpx.Response:
        body = {
            "prompt": prompt,
            "temperature": 0,
            "max_tokens": 4,
            "return_token_ids": True,
            "kv_transfer_params": hand_over,
        }
        url = f"{urls['decode-0']}/v1/completions"
        return httpx.post(url, json=body, headers=headers, timeout=300, trust_env=False)

    good = prefill("hello there")
    assert decode("another one", good).status_code == 409, "the KV of another prompt, of the same length"
    stale = decode("hello there", {**good, "epoch": "old"})
    assert (stale.status_code, stale.json()["error"]["type"]) == (409, "kv_lost")
    unknown = decode("hello there", {**good, "lease_id": "nonsense"})
    assert unknown.status_code == 409
    outside = decode("hello there", {**good, "remote_block_ids": [10**6]})
    assert outside.status_code == 409, "its failed read released the lease"
    for malformed in ({"do_remote_prefill": True}, {**good, "remote_block_ids": "x"}, [1], "x", 5):
        assert decode("hello there", malformed).status_code == 400
    fresh = prefill("hello there")
    answer = decode("hello there", fresh)
    assert answer.status_code == 200, "as a router written for vLLM would send it: the first token is in the hand-over"
    assert answer.json()["choices"][0]["token_ids"] == service.complete("hello there", max_tokens=4)["token_ids"]
    assert decode("hello there", fresh).status_code == 409, "a hand-over is good for one decode"


def test_a_request_whose_last_token_was_the_last_ends_there(service: Service) -> None:
    """An engine may die after its last token but before reporting the end; the next engine must not add a token."""
    headers = secret_of(service)
    whole = service.complete("hello")  # OpenAI's default of 16 tokens, which the proxy does not know
    for name in ("prefill-0", "decode-0"):
        url = f"http://127.0.0.1:{service.process(name).ports['http']}/v1/completions"
        for hold in ({}, {"kv_transfer_params": {"do_remote_decode": True}}):
            for given in (15, 16):
                body = {"prompt": "hello", "temperature": 0, "return_token_ids": True, **hold,
                        "resume_token_ids": whole["token_ids"][:given]}  # fmt: skip
                answer = httpx.post(url, json=body, headers=headers, timeout=300, trust_env=False).json()
                assert answer["choices"][0]["token_ids"] == whole["token_ids"][given:]
                assert answer["choices"][0]["finish_reason"] == "length"
                assert "kv_transfer_params" not in answer
                assert answer["usage"]["completion_tokens"] == 16


def test_a_hand_over_is_read_by_one_request_at_a_time(service: Service) -> None:
    headers = secret_of(service)
    urls = [f"http://127.0.0.1:{service.process(n).ports['http']}/v1/completions" for n in ("prefill-0", "decode-0")]
    for _ in range(5):
        body = {"prompt": "hello there", "temperature": 0, "max_tokens": 4, "return_token_ids": True}
        held = {**body, "kv_transfer_params": {"do_remote_decode": True}}
        hand_over = httpx.post(urls[0], json=held, headers=headers, timeout=300, trust_env=False).json()[
            "kv_transfer_params"
        ]
        ask = {**body, "kv_transfer_params": hand_over}
        with ThreadPoolExecutor(4) as threads:
            calls = [threads.submit(httpx.post, urls[1], json=ask, headers=headers, timeout=300) for _ in range(4)]
            codes = sorted(call.result().status_code for call in calls)
        assert codes == [200, 409, 409, 409]


def test_many_at_once_with_mixed_ends(service: Service) -> None:
    def one(index: int) -> bool:
        prompt = "hello " * (index % 40 + 1)
        if index % 3 == 0:
            try:
                httpx.post(
                    f"{service.url}/v1/completions",
                    json={"prompt": prompt, "max_tokens": 200},
                    timeout=0.1 + index % 5 / 10,
                    trust_env=False,
                )
            except httpx.TimeoutException:
                return True
            return True
        return len(service.stream(prompt, max_tokens=10)["token_ids"]) == 10

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(one, range(48)))


def test_metrics_tell_what_happened(service: Service) -> None:
    service.complete("hello", max_tokens=4)
    text = service.client.get("/metrics").text
    assert 'pdctl_proxy_requests_total{status="200"}' in text
    assert 'pdctl_proxy_hand_overs_total{decode="decode-0",prefill="prefill-0"}' in text
    assert 'pdctl_proxy_engine_healthy{engine="decode-0"} 1.0' in text
    port = service.process("prefill-0").ports["http"]
    engine = httpx.get(f"http://127.0.0.1:{port}/metrics", headers=service.internal, trust_env=False).text
    assert 'pdctl_engine_leases_ended_total{how="committed"}' in engine
