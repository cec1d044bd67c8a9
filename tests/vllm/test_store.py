"""Real vLLM engines with a real Mooncake store between them: prefill puts, decode gets, and the store is killed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest

from tests.service import Service, pid_of, running, temporary_run, wait_until
from tests.vllm.conftest import Direct, topology
from tests.vllm.test_pair import prompts

pytestmark = pytest.mark.skipif(find_spec("mooncake") is None, reason="needs the Mooncake package")
STORE = """
[[stores]]
name = "kv"
kind = "mooncake"
segment_gb = 0.25
buffer_gb = 0.125
"""
USES = 'connector = "mooncake-store"\nstore = "kv"'
COUNT = 60


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with temporary_run() as run, running(run, topology(1, 1, USES) + STORE) as found:
        yield found


def found_in_store(service: Service) -> float:
    """Tokens of prompts that decode has read from the store."""
    with Direct(service, "decode-0") as decode:
        lines = decode.http.get("/metrics").text.splitlines()
    name = "vllm:external_prefix_cache_hits_total"
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def alone(service: Service, asked: list[str]) -> list[list[int]]:
    """The answers of the prefill engine, which never reads a KV that another has computed."""
    with Direct(service, "prefill-0") as engine:
        return [engine.complete(prompt, max_tokens=16) for prompt in asked]


def answers(service: Service, asked: list[str]) -> list[list[int]]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda prompt: service.complete(prompt, max_tokens=16)["token_ids"], asked))


def test_decode_reads_what_prefill_has_put(service: Service) -> None:
    before, asked = found_in_store(service), prompts(COUNT, seed=11)
    assert answers(service, asked) == alone(service, asked)
    assert found_in_store(service) > before


def test_a_store_killed_under_load_costs_no_answer(service: Service) -> None:
    asked, done = prompts(COUNT, seed=12), threading.Event()
    killed: list[int] = []

    def kill() -> None:
        while not done.is_set() and len(killed) < 3:
            before = service.process("kv")
            os.kill(pid_of(before), signal.SIGKILL)
            killed.append(pid_of(before))
            service.restarted(before)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        found = answers(service, asked)
    finally:
        done.set()
        killer.join()
    assert killed
    assert found == alone(service, asked)
    assert [service.process(name).restarts for name in ("prefill-0", "decode-0")] == [0, 0]

    def is_used_again() -> bool:
        before = found_in_store(service)
        answers(service, prompts(4, seed=len(killed) + int(before)))
        return found_in_store(service) > before

    wait_until(is_used_again, what="engines that have found the new store")


def test_a_killed_prefill_takes_its_part_of_the_store_along(service: Service) -> None:
    asked = prompts(COUNT, seed=13)
    before = service.process("prefill-0")
    killer = threading.Timer(1.0, os.kill, (pid_of(before), signal.SIGKILL))
    killer.start()
    found = answers(service, asked)
    killer.join()
    service.restarted(before)
    service.healthy()
    assert found == alone(service, asked)
