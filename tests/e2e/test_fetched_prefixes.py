"""Beginnings of prompts that another engine has computed, over real engines: fetched, right, and given back."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest

from tests.e2e.test_prefix import cached, metric, tokens
from tests.service import Run, Service, pid_of, running, topology, wait_until

pytestmark = pytest.mark.e2e

FETCHED = "pdctl_engine_prefix_tokens_fetched_total"
LOST = "pdctl_engine_prefixes_lost_total"
LENT = "pdctl_engine_prefixes_lent_total"
ENGINES = ("prefill-0", "prefill-1", "decode-0")


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    extra = 'routing = "round_robin"'
    text = topology(prefills=2, extra=extra, engine_extra="fetch_prefixes = true")
    with running(module_run, text) as found:
        yield found


def total(service: Service, name: str) -> float:
    return sum(metric(service, engine, name) for engine in ENGINES)


def known(service: Service) -> dict[str, float]:
    """Blocks of others that each engine knows of."""
    return {engine: service.engine_state(engine)["counters"]["prefix_blocks_known"] for engine in ENGINES}


def test_a_prefill_engine_fetches_what_the_other_has(service: Service) -> None:
    before = sum(known(service).values())
    prompt = tokens(1, 320)  # 20 blocks
    anew = service.complete(prompt, max_tokens=8, cache_salt="anew")
    first = service.complete(prompt, max_tokens=8, cache_salt="one")
    assert cached(first) == 0
    # Both prefill engines are told what the first one, and decode, can find.
    wait_until(lambda: sum(known(service).values()) >= before + 4 * 20)
    fetched = total(service, FETCHED)
    later = [service.complete(prompt, max_tokens=8, cache_salt="one") for _ in range(2)]
    assert all(answer["token_ids"] == anew["token_ids"] for answer in (first, *later))
    assert [cached(answer) for answer in later] == [304, 304], "all full blocks but the one of the last token"
    assert total(service, FETCHED) == fetched + 304, "once: by the engine that had not computed it"
    assert total(service, LENT) >= 1
    service.idle()


def test_an_answer_is_fetched_from_decode_in_the_next_turn(service: Service) -> None:
    history = tokens(2, 64)
    answer = service.complete(history, max_tokens=80, ignore_eos=True, cache_salt="two")
    history += [*answer["token_ids"], *tokens(3, 10)]
    wait_until(lambda: min(known(service)[name] for name in ENGINES[:2]) > 0)
    fetched = total(service, FETCHED)

    def has_answer() -> bool:
        found = service.complete(history, max_tokens=4, ignore_eos=True, cache_salt="two")
        expected = service.complete(history, max_tokens=4, ignore_eos=True, cache_salt=f"anew {fetched}")
        assert found["token_ids"] == expected["token_ids"]
        return cached(found) >= 128

    assert has_answer() or has_answer(), "144 tokens, of which decode alone has the last 80"
    assert total(service, FETCHED) > fetched
    service.idle()


def test_salts_are_not_mixed(service: Service) -> None:
    prompt = tokens(4, 320)
    service.complete(prompt, max_tokens=2, cache_salt="a")
    service.complete(prompt, max_tokens=2, cache_salt="a")
    assert cached(service.complete(prompt, max_tokens=2, cache_salt="b")) == 0
    service.idle()


def test_a_peer_that_dies_costs_time_only(service: Service) -> None:
    prompt = tokens(5, 640)
    expected = service.complete(prompt, max_tokens=6, cache_salt="anew")["token_ids"]
    before = sum(known(service).values())
    service.complete(prompt, max_tokens=6, cache_salt="p")
    wait_until(lambda: sum(known(service).values()) >= before + 4 * 40)
    victims = [service.process(name) for name in ("prefill-0", "decode-0")]
    for victim in victims:
        for core in psutil.Process(pid_of(victim)).children():
            core.kill()
    answers = [service.complete(prompt, max_tokens=6, cache_salt="p")["token_ids"] for _ in range(3)]
    assert answers == [expected] * 3
    for victim in victims:
        service.restarted(victim)
    service.idle()
    # The new ones tell, and are told.
    before = sum(known(service).values())
    prompt = tokens(6, 320)
    expected = service.complete(prompt, max_tokens=6, cache_salt="anew")["token_ids"]
    first = service.complete(prompt, max_tokens=6, cache_salt="q")
    wait_until(lambda: sum(known(service).values()) >= before + 4 * 20)
    fetched = total(service, FETCHED)
    later = [service.complete(prompt, max_tokens=6, cache_salt="q") for _ in range(2)]
    assert [answer["token_ids"] for answer in (first, *later)] == [expected] * 3
    assert total(service, FETCHED) == fetched + 304
    service.idle()
