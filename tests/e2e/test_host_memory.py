"""`kv_offload_gb` over a real engine: what the pool gives up comes back, and is right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.test_prefix import cached, tokens
from tests.service import Run, Service, running, single

pytestmark = pytest.mark.e2e

# A pool of 100 blocks or so: it holds a few of the prompts below, and none of them for long.
POOL_GB = 0.0016
PROMPTS, LENGTH = 24, 200
FULL = LENGTH // 16 * 16  # tokens of full blocks


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    extra = "kv_offload_gb = 0.05\nfetch_prefixes = true"
    with running(module_run, single(kv_cache_gb=POOL_GB, engine_extra=extra)) as found:
        yield found


def counters(service: Service) -> dict[str, int]:
    return dict(service.engine_state("hybrid-0")["counters"])


def ask(service: Service, number: int, **more: Any) -> dict[str, Any]:
    return service.complete(tokens(number, LENGTH), max_tokens=4, ignore_eos=True, **more)


def test_what_the_pool_has_given_up_comes_back(service: Service) -> None:
    blocks = service.engine_state("hybrid-0")["blocks_total"]
    assert blocks < PROMPTS * FULL // 16 / 2, "the pool is too small for all prompts"
    first = [ask(service, number)["token_ids"] for number in range(PROMPTS)]
    before = counters(service)
    again = [ask(service, number) for number in range(PROMPTS)]
    assert [answer["token_ids"] for answer in again] == first
    # A block that is given up before it is copied is gone; that takes a thread that gets no turn for several prompts.
    assert sum(map(cached, again)) >= 0.8 * PROMPTS * FULL
    after = counters(service)
    assert after["tier_prefix_tokens"] - before["tier_prefix_tokens"] >= PROMPTS * FULL / 2
    assert after["tier_loads_lost"] == 0
    assert after["host_stored"] >= PROMPTS * FULL // 16
    service.idle()


def test_it_is_shown(service: Service) -> None:
    prompt = tokens(90, LENGTH)
    service.complete(prompt, max_tokens=1)
    shown = service.run.cli("kv", check=True).stdout
    assert "host stored" in shown
    text = service.client.get("/metrics").text
    assert 'pdctl_engine_tier_stored_total{engine="hybrid-0",tier="host"}' in text


def test_salts_share_nothing(service: Service) -> None:
    ask(service, 70, cache_salt="a")
    assert cached(ask(service, 70, cache_salt="b")) == 0
    assert cached(ask(service, 70, cache_salt="a")) == FULL
    service.idle()
