"""A real service whose roles follow the load: a queue of prompts gets another engine, and every decision is told."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.service import Run, Service, running, topology

pytestmark = pytest.mark.e2e

# Any queue misses this target.
SLO = "[slo]\nttft_ms = 20\ntpot_ms = 5000\n"
_SALTS = itertools.count()


def text(mode: str) -> str:
    elastic = f'[elastic]\nmode = "{mode}"\ninterval_s = 0.2\ncooldown_s = 3600\n'
    return topology(decodes=2) + SLO + elastic


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    with running(module_run, text("advise")) as found:
        found.healthy()
        yield found


def prompts_until(service: Service, is_over: threading.Event) -> None:
    while not is_over.is_set():
        service.complete([5 + number % 300 for number in range(1900)], max_tokens=2, cache_salt=f"{next(_SALTS)}")


def decisions(service: Service) -> list[dict[str, Any]]:
    found = json.loads(service.run.cli("why", "--elastic", "--json", check=True).stdout)
    return [entry for entry in found if entry["process"] != "pdctl"]


def under_prompts(service: Service, condition: Any) -> None:
    """Long prompts from eight clients until the condition holds."""
    is_over = threading.Event()
    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(prompts_until, service, is_over) for _ in range(8)]
        try:
            service.wait(condition, what="a decision")
        finally:
            is_over.set()
        for client in clients:
            client.result(300)


def test_advice_changes_nothing_and_says_what_it_would_do(service: Service) -> None:
    under_prompts(service, lambda: decisions(service))
    found = decisions(service)[0]
    assert found["process"] in ("decode-0", "decode-1")
    assert "would change to prefill" in found["message"]
    assert found["now"]["prefill"] > 1 > found["now"]["decode"]
    assert found["then"]["prefill"] < found["now"]["prefill"]
    assert {p.name: p.role for p in service.engines()} == {
        "prefill-0": "prefill", "decode-0": "decode", "decode-1": "decode",
    }  # fmt: skip
    shown = service.run.cli("why", "--elastic", check=True).stdout
    assert "would change to prefill" in shown
    assert "pressure prefill" in shown
    service.idle()


def test_acting_gives_a_queue_of_prompts_another_engine(service: Service) -> None:
    quiet = service.complete("one two three", max_tokens=40, ignore_eos=True)["token_ids"]
    port = service.url.rpartition(":")[2]
    service.run.write(text("act").replace("port = ", f"port = {port} # ", 1))
    done = service.run.cli("apply", check=True)
    assert "elastic changed" in done.stdout

    def changed() -> bool:
        return [p.role for p in service.engines()].count("prefill") == 2

    under_prompts(service, changed)
    name = next(p.name for p in service.engines() if p.planned_role)
    assert any("changes to prefill" in entry["message"] for entry in decisions(service) if entry["process"] == name)
    assert service.complete("one two three", max_tokens=40, ignore_eos=True)["token_ids"] == quiet
    service.wait(lambda: not service.process(name).leaving_role, what="the end of its answers")
    service.idle()
