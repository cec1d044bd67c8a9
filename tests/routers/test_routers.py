"""vllm-router and LMDeploy's proxy drive two engines: same answers, and nothing stays held."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from tests.routers.routers import MISSING, lmdeploy_proxy, url, vllm_router
from tests.service import Run, Service, events, pid_of, running, topology, wait_until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(MISSING), reason=f"run scripts/routers: {' and '.join(MISSING)} missing"),
]

ROUTERS = {"vllm-router": vllm_router, "lmdeploy": lmdeploy_proxy}

PROMPTS = [
    "x",
    "Once upon a time there was",
    # A token for each letter: a whole number of blocks, and one more, of which one block less is read.
    "." * 64,
    "." * 65,
    "A long way from here, " * 40,
]
OPTIONS: list[dict[str, Any]] = [
    {"max_tokens": 12},
    {"max_tokens": 1},
    {"max_tokens": 12, "temperature": 0.9, "seed": 7},
    {"max_tokens": 12, "stop": ["<3"]},
]


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    with running(module_run, topology("sample:tiny-chat", engine_extra="open = true", lease_s=60)) as found:
        yield found


@pytest.fixture(scope="module", params=list(ROUTERS))
def router(request: pytest.FixtureRequest, service: Service) -> Iterator[httpx.Client]:
    with ExitStack() as stack:
        yield stack.enter_context(ROUTERS[request.param](service))


def answer(client: httpx.Client, chat: bool, stream: bool, text: str, **options: Any) -> tuple[str, str]:
    """The text and the finish reason."""
    path = "/v1/chat/completions" if chat else "/v1/completions"
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    body = {"model": "m", "temperature": 0, "stream": stream, **prompt, **options}
    if not stream:
        whole = client.post(path, json=body)
        assert whole.status_code == 200, whole.text
        (choice,) = whole.json()["choices"]
        return choice["message"]["content"] if chat else choice["text"], choice["finish_reason"]
    found, reason, done = "", "", False
    with client.stream("POST", path, json=body) as streamed:
        assert streamed.status_code == 200, streamed.read()
        for event in events(streamed):
            done = event is None
            for choice in event["choices"] if event else ():
                found += choice["delta"].get("content", "") if chat else choice["text"]
                reason = choice["finish_reason"] or reason
    assert done, "no [DONE]"
    return found, reason


def counted(service: Service, name: str, how: str) -> float:
    """How many leases of an engine have ended in this way."""
    text = service.client.get(f"{url(service, name)}/metrics").text
    found = re.search(rf'^pdctl_engine_leases_ended_total\{{[^}}]*how="{how}"[^}}]*\}} (\S+)$', text, re.MULTILINE)
    assert found is not None, text
    return float(found[1])


def transfers(service: Service) -> dict[str, float]:
    return dict(service.engine_state("decode-0")["transfers"])


def nothing_is_held(service: Service) -> None:
    """No lease and no block, and none of it by waiting for a deadline."""
    service.idle()
    assert "no leases" in service.run.cli("kv", check=True).stdout
    assert counted(service, "prefill-0", "expired") == 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_the_same_answers(service: Service, router: httpx.Client, chat: bool, stream: bool) -> None:
    """As one engine alone and as this project's proxy gives, with each prompt's KV handed over."""
    before = transfers(service)
    cases = [(prompt, options) for prompt in PROMPTS for options in OPTIONS]
    through_router = [answer(router, chat, stream, prompt, **options) for prompt, options in cases]
    after = transfers(service)
    with httpx.Client(base_url=url(service, "decode-0"), timeout=300, trust_env=False) as alone:
        for ask in (alone, service.client):
            assert through_router == [answer(ask, chat, stream, prompt, **options) for prompt, options in cases]
    # Without its last token nothing is left of a prompt of one.
    handed_over = [prompt for prompt, _ in cases if chat or prompt != "x"]
    assert after["hand_overs"] - before["hand_overs"] == len(handed_over)
    assert after["lost"] == before["lost"]
    nothing_is_held(service)


def test_many_at_once(service: Service, router: httpx.Client) -> None:
    """Each gets its own prompt's KV."""
    before = transfers(service)

    def through(client: httpx.Client) -> list[tuple[str, str]]:
        with ThreadPoolExecutor(16) as pool:
            waiting = [
                pool.submit(answer, client, one % 2 == 0, one % 3 == 0, f"{one} times " * one, max_tokens=20)
                for one in range(1, 65)
            ]
            return [found.result() for found in waiting]

    given = through(router)
    after = transfers(service)
    assert given == through(service.client)
    assert (after["hand_overs"] - before["hand_overs"], after["lost"] - before["lost"]) == (64, 0)
    nothing_is_held(service)


def test_what_decode_refuses_is_released(service: Service, router: httpx.Client) -> None:
    """Prefill accepts it, because routers ask it for one token."""
    body = {"model": "m", "prompt": "Once upon a time", "max_tokens": 100_000}
    refused = router.post("/v1/completions", json=body)
    assert "this model's context is 2048 tokens" in refused.text
    nothing_is_held(service)


def test_a_client_leaves(service: Service, router: httpx.Client) -> None:
    body = {"model": "m", "prompt": "Once upon a time", "max_tokens": 1500, "stream": True, "ignore_eos": True}
    with router.stream("POST", "/v1/completions", json=body) as streamed:
        next(events(streamed))
    nothing_is_held(service)


@pytest.mark.parametrize("name", ["decode-0", "prefill-0"])
def test_an_engine_is_killed(service: Service, router: httpx.Client, name: str) -> None:
    """The router fails over nothing, but nothing stays held, and it goes on as soon as the engine is back."""
    body = {"model": "m", "prompt": "Once upon a time", "max_tokens": 1500, "stream": True, "ignore_eos": True}
    before = service.process(name)
    with router.stream("POST", "/v1/completions", json=body) as streamed:
        try:
            for number, _ in enumerate(events(streamed)):
                if number == 2:
                    os.kill(pid_of(before), signal.SIGKILL)
        except (httpx.RemoteProtocolError, ValueError):
            assert name == "decode-0"
    service.restarted(before)
    service.healthy()
    nothing_is_held(service)
    expected = answer(service.client, False, False, PROMPTS[1], max_tokens=8)

    def served() -> bool:
        body = {"model": "m", "prompt": PROMPTS[1], "max_tokens": 8, "temperature": 0}
        found = router.post("/v1/completions", json=body)
        if found.status_code != 200:
            return False
        assert found.json()["choices"][0]["text"] == expected[0], found.text
        return True

    wait_until(served, what="the router to serve again")
    nothing_is_held(service)
