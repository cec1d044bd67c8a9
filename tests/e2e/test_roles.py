"""Engines change their roles while they serve: no request is lost, no token changes, and the role stays."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from pdctl.errors import PdctlError
from tests.e2e.test_migration import counted
from tests.service import Run, Service, pid_of, running, topology

pytestmark = pytest.mark.e2e

PROMPT = "The quick brown fox jumps over the lazy dog. "
LONG = 1200


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    with running(module_run, topology(decodes=2, inline=True)) as found:
        found.healthy()
        yield found


def is_done(service: Service, name: str) -> None:
    service.wait(lambda: not service.process(name).leaving_role, what=f"{name} to end its old role's work")


def test_the_new_role_works_at_once_and_the_old_one_ends(service: Service) -> None:
    quiet = service.complete(PROMPT, max_tokens=LONG, ignore_eos=True)["token_ids"]
    name, failed = "", counted(service, "pdctl_proxy_failovers_total")

    def change() -> None:
        nonlocal name
        name = next(n for n in ("decode-0", "decode-1") if service.engine_state(n)["running"])
        service.control.change_role(name, "prefill", 0.0)

    found = service.stream(PROMPT, change, 20, max_tokens=LONG, ignore_eos=True)
    assert found["token_ids"] == quiet
    is_done(service, name)
    shown = service.process(name)
    assert (shown.role, shown.planned_role) == ("prefill", "decode")
    assert service.engine_state(name)["role"] == "prefill"
    assert counted(service, "pdctl_proxy_failovers_total") == failed
    before = service.engine_state(name)["counters"]["prompts_own"]
    other = "decode-1" if name == "decode-0" else "decode-0"
    for number in range(4):
        service.complete(f"{number} {PROMPT}" * 30, max_tokens=4)
    assert service.engine_state(name)["counters"]["prompts_own"] == before, "it computes no answers any more"
    # It prefills for the only decode engine that is left.
    links = {(link["peer"]) for link in service.engine_state(other)["links"]}
    assert name in links
    with pytest.raises(PdctlError, match="no other engine decodes"):
        service.control.change_role(other, "prefill")
    service.control.change_role(name, "decode")
    is_done(service, name)
    assert service.process(name).planned_role == ""
    service.idle()


def test_the_role_stays_over_restarts_and_applies(service: Service) -> None:
    service.run.cli("role", "decode-0", "hybrid", check=True)
    before = service.process("decode-0")
    service.run.cli("restart", "decode-0", check=True)
    after = service.restarted(before)
    assert (after.role, after.planned_role) == ("hybrid", "decode")
    service.healthy()
    assert service.engine_state("decode-0")["role"] == "hybrid"
    done = service.run.cli("apply", check=True)
    assert "unchanged" in done.stdout
    assert service.process("decode-0").role == "hybrid"
    assert pid_of(service.process("decode-0")) == pid_of(after)
    assert "hybrid (asked)" in service.run.cli("status", extra={"COLUMNS": "250"}).stdout
    dry = service.run.cli("role", "decode-0", "decode", "--dry-run", check=True)
    assert "hybrid to decode, without a restart" in dry.stdout
    assert service.process("decode-0").role == "hybrid"
    service.run.cli("role", "decode-0", "decode", check=True)
    assert "decode-0 is decode already" in service.run.cli("role", "decode-0", "decode", check=True).stdout
    service.idle()


def test_a_request_of_an_earlier_epoch_is_refused(service: Service) -> None:
    service.run.cli("role", "decode-0", "hybrid", check=True)
    process = service.process("decode-0")
    epoch = service.engine_state("decode-0")["role_epoch"]
    url = f"http://127.0.0.1:{process.ports['http']}/v1/completions"
    body = {"prompt": PROMPT, "max_tokens": 2}
    answers = [
        httpx.post(url, json=body, headers={**service.internal, "x-pdctl-role-epoch": str(sent)}, trust_env=False)
        for sent in (epoch - 1, epoch, epoch + 1)
    ]
    assert [answer.status_code for answer in answers] == [409, 200, 200]
    assert answers[0].json()["error"]["type"] == "role_changed"
    service.run.cli("role", "decode-0", "decode", check=True)
    service.idle()


def test_random_changes_under_streams_lose_nothing(service: Service) -> None:
    prompts = [f"{number} {PROMPT}" * (1 + number % 4) for number in range(12)]
    quiet = {prompt: service.complete(prompt, max_tokens=200, ignore_eos=True)["token_ids"] for prompt in prompts}
    ends, chance, wrong = threading.Event(), random.Random(7), list[str]()
    refused: list[str] = []

    def client(number: int) -> int:
        answers = 0
        while not ends.is_set():
            prompt = prompts[(number + answers) % len(prompts)]
            if service.stream(prompt, max_tokens=200, ignore_eos=True)["token_ids"] != quiet[prompt]:
                wrong.append(prompt)
            answers += 1
        return answers

    changes = 0
    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client, number) for number in range(8)]
        while changes < 16 and not any(one.done() for one in clients):
            name = chance.choice(["prefill-0", "decode-0", "decode-1"])
            role = chance.choice(["prefill", "decode", "hybrid"])
            try:
                service.control.change_role(name, role, chance.choice([0.0, 0.2, 5.0]))  # type: ignore[arg-type]
                changes += 1
            except PdctlError as failure:
                refused.append(str(failure))
        ends.set()
        assert sum(one.result(300) for one in clients) >= 8
    assert not wrong
    assert all("no other engine" in reason for reason in refused)
    for name, role in (("prefill-0", "prefill"), ("decode-0", "decode"), ("decode-1", "decode")):
        if service.process(name).role != role:
            service.control.change_role(name, "hybrid")
    for name, role in (("prefill-0", "prefill"), ("decode-0", "decode"), ("decode-1", "decode")):
        service.control.change_role(name, role)  # type: ignore[arg-type]
        is_done(service, name)
    service.idle()
