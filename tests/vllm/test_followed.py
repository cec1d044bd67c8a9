"""The proxy follows the KV events of real vLLM engines; and the fake engines' events have vLLM's form."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import httpx
import msgspec
import pytest

from pdctl.proxy_wire import PoolReply
from tests.fakes.kv_events import CLEARED, Cache, removed
from tests.service import Service, running, temporary_run, wait_until
from tests.vllm.conftest import PYTHON, Direct, alone, group, topology

ENGINES = ("hybrid-0", "hybrid-1")
BLOCK = 32
HITS = "vllm:prefix_cache_hits_total"

DECODED = """
import sys, msgspec
from vllm.distributed.kv_events import KVEventBatch
payload = bytes.fromhex(sys.argv[1])
batch = msgspec.msgpack.Decoder(type=KVEventBatch).decode(payload)
print([type(event).__name__ for event in batch.events], batch.events[0].block_size, batch.data_parallel_rank)
"""


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    extra = f'block_size = {BLOCK}\nenv = {{ VLLM_SERVER_DEV_MODE = "1" }}'
    text = alone(group("hybrid", 2, extra)).replace("[proxy]", '[proxy]\nrouting = "prefix_aware"')
    with temporary_run() as run, running(run, text) as found:
        yield found


def blocks(service: Service, name: str) -> int:
    """What the proxy knows of an engine."""
    answer = httpx.get(f"{service.url}/pdctl/v1/pool", headers=service.internal, trust_env=False, timeout=60)
    return msgspec.json.decode(answer.content, type=PoolReply).engines[name].blocks


def reset(service: Service, name: str) -> None:
    """Drop an engine's prefix cache. vLLM publishes that with its next step."""
    with Direct(service, name) as engine:
        answer = engine.http.post("/reset_prefix_cache")
        assert answer.json() == {"success": True}, answer.text
        engine.complete("a", max_tokens=1)
    wait_until(lambda: blocks(service, name) == 0, 60, f"nothing known of {name}")


def sent(service: Service, name: str, prompt: str) -> None:
    """Another client's prompt, which this proxy does not see."""
    with Direct(service, name) as engine:
        tokens = engine.http.post("/tokenize", json={"model": "m", "prompt": prompt}).json()["count"]
        engine.complete(prompt, max_tokens=1)
    wait_until(lambda: blocks(service, name) == tokens // BLOCK, 60, f"{tokens // BLOCK} blocks known of {name}")


def hits(service: Service) -> dict[str, float]:
    found = {}
    for name in ENGINES:
        with Direct(service, name) as engine:
            lines = engine.http.get("/metrics").text.splitlines()
            found[name] = sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(HITS))
    return found


def asked(service: Service, begin: str) -> tuple[str, ...]:
    """The engines that have found the beginning of six prompts."""
    before = hits(service)
    for number in range(6):
        body = {"model": "m", "prompt": f"{begin}question {number}", "max_tokens": 2, "temperature": 0}
        assert service.client.post("/v1/completions", json=body).status_code == 200
    after = hits(service)
    return tuple(name for name in ENGINES if after[name] - before[name] >= 6 * BLOCK)


def words(first: str) -> str:
    return (first + " " + "the same words for all of them, " * 99)[:800]


def test_prompts_go_where_another_client_has_sent_the_same_beginning_until_the_cache_is_reset(service: Service) -> None:
    begin = words("x")
    body = {"model": "m", "prompt": begin + "first", "max_tokens": 2, "temperature": 0}
    assert service.client.post("/v1/completions", json=body).status_code == 200
    wait_until(lambda: any(blocks(service, name) for name in ENGINES), 60, "news of a prompt")
    for name in ENGINES:
        reset(service, name)
    sent(service, "hybrid-1", begin)
    assert asked(service, begin) == ("hybrid-1",)
    reset(service, "hybrid-1")
    sent(service, "hybrid-0", begin)
    assert asked(service, begin) == ("hybrid-0",)


def test_chats_are_tokenized_as_they_are_computed(service: Service) -> None:
    for name in ENGINES:
        reset(service, name)
    begin, after = words("y"), "the end " * 20

    def body(text: str) -> dict[str, object]:
        return {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": 2, "temperature": 0}

    assert service.client.post("/v1/chat/completions", json=body(begin + after)).status_code == 200
    wait_until(lambda: any(blocks(service, name) for name in ENGINES), 60, "news of a chat")
    for name in ENGINES:
        reset(service, name)
    with Direct(service, "hybrid-1") as engine:
        assert engine.http.post("/v1/chat/completions", json=body(begin + after)).status_code == 200
    wait_until(lambda: blocks(service, "hybrid-1") > 1, 60, "news of the same chat")
    before = hits(service)
    for number in range(6):
        assert service.client.post("/v1/chat/completions", json=body(f"{begin}{number}{after}")).status_code == 200
    assert hits(service)["hybrid-0"] == before["hybrid-0"]
    assert hits(service)["hybrid-1"] >= before["hybrid-1"] + 6 * BLOCK


def test_a_prefill_engine_of_a_pair_is_followed() -> None:
    text = topology(1, 1, f"block_size = {BLOCK}").replace("[proxy]", '[proxy]\nrouting = "prefix_aware"')
    prompt = words("z")
    with temporary_run() as run, running(run, text) as pair:
        with Direct(pair, "decode-0") as alone_engine:
            expected = alone_engine.complete(prompt, max_tokens=8)
            tokens = alone_engine.http.post("/tokenize", json={"model": "m", "prompt": prompt}).json()["count"]
        assert pair.stream(prompt, max_tokens=8)["token_ids"] == expected
        wait_until(lambda: blocks(pair, "prefill-0") == tokens // BLOCK, 60, "news of the prompt")
        assert blocks(pair, "decode-0") == 0, "nobody asks where a prompt is decoded"


def test_vllms_classes_read_the_fake_engines_events() -> None:
    cache = Cache(BLOCK)
    events = [*cache.compute(list(range(100))), removed([b"a"]), CLEARED]
    payload = msgspec.msgpack.encode([1.0, events, 0])
    done = subprocess.run([PYTHON, "-c", DECODED, payload.hex()], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['BlockStored', 'BlockRemoved', 'AllBlocksCleared'] 32 0"
