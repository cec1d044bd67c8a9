"""Fair shares in virtual time: the admission and the scheduler that ship, on traffic of several keys."""

from __future__ import annotations

import pytest

from pdctl.proxy_wire import KeySettings
from tests.proxy.request.virtual_proxy import Load, Results, VirtualProxy

# Requests per second of a key that takes about 3% of the one engine.
RATE = 0.0125
SINGLE = Load("single", RATE)
SECONDS = 120 / RATE


def floods(prompt: int) -> Load:
    """50 times the requests: more than the engine can compute."""
    return Load("flood", 50 * RATE, prompt)


@pytest.fixture(scope="module")
def alone() -> Results:
    return VirtualProxy().run(SINGLE, seconds=SECONDS)


@pytest.mark.parametrize(("policy", "prompt", "most"), [("fcfs", 800, 1.5), ("edf", 800, 1.5), ("fcfs", 4000, 1.6)])
def test_a_key_hardly_feels_another_ones_flood(alone: Results, policy: str, prompt: int, most: float) -> None:
    found = VirtualProxy(policy=policy).run(SINGLE, floods(prompt), seconds=SECONDS)
    assert found.refused.keys() <= {"flood"}
    assert len(found.ttft_s["single"]) == len(alone.ttft_s["single"])
    assert found.ttft("single", 0.99) <= most * alone.ttft("single", 0.99)


def test_without_fair_shares_it_would(alone: Results) -> None:
    found = VirtualProxy(fair=False).run(SINGLE, floods(800), seconds=SECONDS)
    assert found.refused["single"] > 0
    assert found.ttft("single", 0.5) > 10 * alone.ttft("single", 0.5)


def test_the_engine_has_as_much_to_do_as_without_fair_shares() -> None:
    """Prompts that wait in the proxy are not missing at the engine."""
    fair, unfair = (VirtualProxy(fair=fair) for fair in (True, False))
    for proxy in (fair, unfair):
        proxy.run(SINGLE, floods(800), seconds=SECONDS / 4)
    busy = [sum(engine.busy_s for engine in proxy.engines) / proxy.time() for proxy in (fair, unfair)]
    assert busy[0] > 0.98 * busy[1]


def test_shares_follow_the_weights_whatever_the_lengths() -> None:
    keys = KeySettings("a", 3.0), KeySettings("b", 1.0)
    loads = Load("a", 3.0, 300, 30), Load("b", 1.0, 3000, 60)
    proxy = VirtualProxy(keys, prefills=2, max_queue=200)
    served = proxy.run(*loads, seconds=2000).served
    assert served["a"] / served["b"] == pytest.approx(3.0, rel=0.15)


def test_an_urgent_class_goes_first_and_the_other_gets_an_eighth() -> None:
    keys = (KeySettings("urgent", priority=-1),)
    loads = Load("urgent", 2.0), Load("normal", 2.0)
    served = VirtualProxy(keys).run(*loads, seconds=2000).served
    assert served["normal"] / (served["urgent"] + served["normal"]) == pytest.approx(1 / 8, abs=0.03)


def test_many_keys_that_all_want_more_get_the_same() -> None:
    loads = [Load(f"key-{number}", 0.2 + 0.1 * number, 200 + 100 * number) for number in range(12)]
    served = VirtualProxy(prefills=2).run(*loads, seconds=3000).served
    assert max(served.values()) < 1.5 * min(served.values())
