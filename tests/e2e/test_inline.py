"""Whole requests on decode engines, over real engines: the same tokens wherever a prompt is computed."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psutil
import pytest

from tests.service import Run, Service, pid_of, running, topology

pytestmark = pytest.mark.e2e

_SALTS = itertools.count()


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    with running(module_run, topology(inline=True)) as found:
        yield found


def placed(service: Service) -> dict[tuple[str, str], int]:
    """Prompts so far by (engine, why)."""
    found = {}
    for line in service.client.get("/metrics").text.splitlines():
        if line.startswith("pdctl_proxy_prompts_placed_total{"):
            labels, _, count = line.partition("{")[2].partition("} ")
            pairs = dict(label.split("=") for label in labels.split(","))
            found[pairs["engine"].strip('"'), pairs["why"].strip('"')] = int(float(count))
    return found


def tokens(number: int, count: int) -> list[int]:
    """Prompts with different numbers begin differently."""
    return [5 + (31 * number + 7 * index) % 370 for index in range(count)]


@contextmanager
def long_prompt(service: Service, engine: str) -> Iterator[None]:
    """Meanwhile this engine computes prompts of 1,900 tokens: several at once, as one alone may be computed inline."""
    ends = threading.Event()

    def send() -> None:
        while not ends.is_set():
            # Another salt each time: what is cached takes no time.
            service.complete(tokens(1, 1900), max_tokens=1, cache_salt=f"long {next(_SALTS)}")

    with ThreadPoolExecutor(3) as pool:
        sent = [pool.submit(send) for _ in range(3)]
        try:
            service.wait(lambda: service.engine_state(engine)["running"], 60, "a long prompt")
            yield
        finally:
            ends.set()
        for one in sent:
            one.result(60)


def test_short_prompts_are_computed_inline_and_long_ones_are_not(service: Service) -> None:
    service.complete(tokens(0, 20), max_tokens=2)  # the proxy knows both engines' latency models now
    before = placed(service)
    for number in range(8):
        service.complete([5 + number], max_tokens=8)
        service.complete(tokens(10 + number, 1800), max_tokens=8)
    after = placed(service)
    assert after.get(("decode-0", "short"), 0) >= before.get(("decode-0", "short"), 0) + 4
    assert after["", "remote"] >= before.get(("", "remote"), 0) + 4
    shown = service.process("decode-0")
    assert shown.prompts_own
    assert shown.prompts_received
    service.idle()


def test_a_busy_prefill_engine_is_avoided_and_no_token_changes(service: Service) -> None:
    before = placed(service)
    for number in range(3, 9):
        prompt = tokens(number, 60 * (number - 2))
        for extra in ({}, {"temperature": 0.9, "seed": number}):
            with long_prompt(service, "prefill-0"):
                inline = service.complete(prompt, max_tokens=24, cache_salt="a", **extra)
            paired = service.complete(prompt, max_tokens=24, cache_salt="b", **extra)
            assert inline["token_ids"] == paired["token_ids"], f"prompt {number}, {extra}"
    assert placed(service)["decode-0", "prefill_busy"] > before.get(("decode-0", "prefill_busy"), 0)
    service.idle()


def test_a_decode_engine_that_dies_with_an_inline_request_loses_nothing(service: Service) -> None:
    prompt = tokens(20, 14)
    expected = service.complete(prompt, max_tokens=200, ignore_eos=True)
    inline = 0
    for at in (0, 120):
        service.healthy()
        before, victim = placed(service), service.process("decode-0")
        with long_prompt(service, "prefill-0"):
            answer = service.stream(
                prompt, psutil.Process(pid_of(victim)).kill, at, max_tokens=200, ignore_eos=True, cache_salt=str(at)
            )
        assert answer["token_ids"] == expected["token_ids"]
        inline += sum(count - before.get(key, 0) for key, count in placed(service).items() if key[0] == "decode-0")
        service.restarted(victim)
    assert inline
    service.healthy()
    service.idle()


def test_off_by_a_key(module_run: Run, service: Service) -> None:
    text = (module_run.folder / "pdctl.toml").read_text()
    module_run.write(text.replace("inline_prefill = true", "inline_prefill = false"))
    module_run.cli("apply", check=True)
    service.healthy()
    before = service.process("decode-0").prompts_own
    service.complete(tokens(30, 12), max_tokens=4)
    assert service.process("decode-0").prompts_own == before
    service.idle()
