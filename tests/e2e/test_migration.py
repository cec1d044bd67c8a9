"""Running streams move to another engine: the same tokens, no failover, and drains that end before long answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.service import Run, Service, running, topology

pytestmark = pytest.mark.e2e

PROMPT = "The quick brown fox jumps over the lazy dog. "
LONG = 1500


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    with running(module_run, topology(decodes=2, inline=True)) as found:
        found.healthy()
        yield found


def counted(service: Service, name: str) -> float:
    lines = service.client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))


def moved(service: Service) -> float:
    return counted(service, "pdctl_proxy_streams_moved_total")


def failovers(service: Service) -> float:
    return counted(service, "pdctl_proxy_failovers_total")


def busy(service: Service) -> str:
    """The engine that runs a stream."""
    found = service.wait(
        lambda: next((n for n in ("decode-0", "decode-1") if service.engine_state(n)["running"]), None),
        what="an engine that decodes",
    )
    return str(found)


def drain_and_start(service: Service) -> None:
    # Not by the command line, whose start takes as long as hundreds of tokens.
    name = busy(service)
    service.control.act(name, "drain")
    service.wait(lambda: service.process(name).state == "drained", what="the drain's end")
    assert not service.engine_state(name)["running"]
    service.control.act(name, "start")


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 0.9, "top_p": 0.95, "seed": 7},
    "penalties": {"temperature": 0.7, "seed": 3, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "log probabilities": {"logprobs": 2},
    "stop strings": {"stop": ["never in the text", "nor this"]},
}


# These say again what the others say.
_SLOW = ("penalties", "stop strings")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in _SLOW else kind for kind in OPTIONS]
)
def test_a_stream_moves_at_a_drain_and_no_token_changes(service: Service, kind: str) -> None:
    options = {"max_tokens": LONG, "ignore_eos": True, **OPTIONS[kind]}
    quiet = service.complete(PROMPT * 3, **options)
    service.healthy()
    before, failed = moved(service), failovers(service)
    at = 10 + 3 * len(kind)
    found = service.stream(PROMPT * 3, lambda: drain_and_start(service), at, **options)
    assert found["token_ids"] == quiet["token_ids"]
    assert found["text"] == quiet["text"]
    assert moved(service) > before
    assert failovers(service) == failed, "it was moved, not computed again"
    service.idle()


def test_a_drained_restart_under_load_does_not_wait_for_long_answers(service: Service) -> None:
    prompts = [f"{number} {PROMPT}" for number in range(8)]
    quiet = [service.complete(prompt, max_tokens=64, ignore_eos=True)["token_ids"] for prompt in prompts]
    service.healthy()
    started, failed, before = threading.Barrier(9), failovers(service), moved(service)

    def begun() -> None:
        started.wait(60)

    def answer(prompt: str) -> list[int]:
        found = service.stream(prompt, begun, 3, max_tokens=LONG, ignore_eos=True)
        ids: list[int] = found["token_ids"]
        return ids

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(answer, prompt) for prompt in prompts]
        started.wait(60)
        for name in ("decode-0", "decode-1", "prefill-0"):
            service.run.cli("restart", name, "--drain", check=True)
            service.healthy()
        found = [answer.result(300) for answer in answers]
    assert [ids[:64] for ids in found] == quiet
    assert {len(ids) for ids in found} == {LONG}
    assert moved(service) > before
    assert failovers(service) == failed
    service.idle()
