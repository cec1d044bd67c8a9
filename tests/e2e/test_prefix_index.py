"""Routing by what engines say they have, over real engines: a new proxy knows it, and what is gone is not believed."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import msgspec
import psutil
import pytest

from pdctl.net.prefixes.beginnings import PIECE_BYTES
from pdctl.proxy_wire import PoolReply
from tests.e2e.test_prefix import cached, tokens
from tests.service import Run, Service, pid_of, running, topology, wait_until

pytestmark = pytest.mark.e2e

PREFILLS = ("prefill-0", "prefill-1")


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    text = topology(prefills=2, extra='routing = "prefix_aware"', kv_cache_gb=0.02)
    with running(module_run, text) as found:
        yield found


def told(service: Service) -> dict[str, int]:
    """How many beginnings each engine has told the proxy of."""
    answer = httpx.get(f"{service.url}/pdctl/v1/pool", headers=service.internal, trust_env=False, timeout=60)
    pool = msgspec.json.decode(answer.content, type=PoolReply)
    return {name: load.beginnings for name, load in pool.engines.items()}


def prompts(first: int) -> list[list[int]]:
    """About 6 pieces each."""
    return [tokens(number, 400) for number in range(first, first + 6)]


def test_a_new_proxy_sends_prompts_where_their_kv_is(service: Service) -> None:
    asked = prompts(1)
    before = sum(told(service)[name] for name in PREFILLS)
    expected = [service.complete(prompt, max_tokens=4)["token_ids"] for prompt in asked]
    wait_until(lambda: sum(told(service)[name] for name in PREFILLS) >= before + 6 * 5, what="news of six prompts")
    proxy = service.process("proxy")
    psutil.Process(pid_of(proxy)).kill()
    service.restarted(proxy)
    service.healthy()
    wait_until(lambda: sum(told(service)[name] for name in PREFILLS) >= before + 6 * 5, what="the same news")
    answers = [service.complete(prompt, max_tokens=4) for prompt in asked]
    assert [answer["token_ids"] for answer in answers] == expected
    assert min(cached(answer) for answer in answers) >= 384, "all but the last block, of every prompt"
    service.idle()


def test_of_an_engine_that_was_restarted_nothing_is_believed(service: Service) -> None:
    asked = prompts(11)
    expected = [service.complete(prompt, max_tokens=4)["token_ids"] for prompt in asked]
    wait_until(lambda: all(told(service)[name] >= 5 for name in PREFILLS), what="news of both")
    victim = service.process("prefill-0")
    for core in psutil.Process(pid_of(victim)).children():
        core.kill()
    service.restarted(victim)
    service.healthy()
    assert told(service)["prefill-0"] == 0
    answers = [service.complete(prompt, max_tokens=4)["token_ids"] for prompt in asked]
    assert answers == expected
    service.idle()


def test_what_was_dropped_is_told(service: Service) -> None:
    """Pools have room for 13 prompts each: of 45, most are gone, and the proxy knows it."""
    asked = [tokens(100 + number, 1600) for number in range(45)]
    for number, prompt in enumerate(asked):
        service.complete(prompt, max_tokens=1, cache_salt=f"other {number}")
    service.idle()
    assert service.engine_state("prefill-0")["blocks_total"] < 14 * 100
    each = len(str(asked[0])) // PIECE_BYTES
    assert 0 < sum(told(service)[name] for name in PREFILLS) <= 2 * 14 * each < len(asked) * each


def test_salts_and_keys_name_others(service: Service) -> None:
    prompt = tokens(51, 400)
    service.complete(prompt, max_tokens=2, cache_salt="a")
    assert cached(service.complete(prompt, max_tokens=2, cache_salt="a")) >= 384
    assert cached(service.complete(prompt, max_tokens=2, cache_salt="b")) == 0
    service.idle()
