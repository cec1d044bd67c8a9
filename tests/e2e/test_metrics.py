"""One address for the metrics of a whole service, and the boards that `pdctl metrics export` makes of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pdctl.boards.dashboards import ALL
from tests.boards.known import known
from tests.boards.test_promtool import filled
from tests.service import Run, Service, free_port, pid_of, running, topology, wait_until

pytestmark = pytest.mark.e2e

# Prompts that prefill-0 and decode-0 share; the name of the service is "t".
PROMPT = "once upon a time "
_OTHER_KINDS = ("vLLM engines", "SGLang engines", "LMDeploy engines")
# Panels without a value in this service, and why.
_EMPTY = {
    "Refused": "no request is refused", "Failovers": "nothing fails", "Tokens by key": "no keys",
    "Running and waiting by key": "no keys", "Accepted guesses": "no drafts",
    "Where prompts are computed": "prompts are computed inline only in a pool that has inline prefill",
}  # fmt: skip


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    with running(module_run, topology()) as found:
        found.healthy()
        for number in range(8):
            found.complete(f"{PROMPT}{number}", max_tokens=4)
        yield found


def families(service: Service) -> dict[str, list[dict[str, str]]]:
    """Labels of each sample, by metric."""
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(service.client.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append({**sample.labels, "=": str(sample.value)})
    return found


def test_one_scrape_has_everything(service: Service) -> None:
    found = families(service)
    assert {labels["source"]: labels["="] for labels in found["pdctl_scrape_ok"]} == dict.fromkeys(
        ("prefill-0", "decode-0", "supervisor"), "1.0"
    )
    assert {labels["engine"] for labels in found["pdctl_engine_blocks"]} == {"prefill-0", "decode-0"}
    assert {labels["process"] for labels in found["pdctl_process_up"]} == {"prefill-0", "decode-0", "proxy"}
    assert [labels["transport"] for labels in found["pdctl_link_up"]] == ["shm"]
    alone = service.client.get("/metrics/proxy").text
    assert "pdctl_proxy_ttft_seconds_bucket" in alone
    assert "pdctl_engine" not in alone


def test_every_metric_is_one_that_the_boards_tests_know(service: Service) -> None:
    """What the boards are checked against is what a service really has."""
    names = known()
    for name, samples in families(service).items():
        assert name in names, name
        for labels in samples:
            assert set(labels) - {"="} <= names[name], name


def test_promtool_accepts_the_whole(service: Service) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (apt: prometheus)")
    text = service.client.get("/metrics").text
    done = subprocess.run(["promtool", "check", "metrics"], input=text, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_frozen_engine_does_not_stop_a_scrape(service: Service) -> None:
    pid = pid_of(service.process("decode-0"))

    def told() -> dict[str, str]:
        return {labels["source"]: labels["="] for labels in families(service)["pdctl_scrape_ok"]}

    os.kill(pid, signal.SIGSTOP)
    try:
        missed = {"prefill-0": "1.0", "decode-0": "0.0", "supervisor": "1.0"}
        wait_until(lambda: told() == missed, what="it to be missed")
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: set(told().values()) == {"1.0"}, what="it to be back")
    service.healthy()


@contextmanager
def started(folder: Path, port: int) -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """Prometheus, as start.sh starts it; a function that queries it."""
    environment = {**os.environ, "PORT": str(port), "DATA": str(folder / "data")}
    process = subprocess.Popen(
        [str(folder / "start.sh")], env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60)

    def ask(query: str) -> list[dict[str, Any]]:
        answer = client.post("/api/v1/query", data={"query": query}).json()
        assert answer["status"] == "success", (query, answer)
        return list(answer["data"]["result"])

    def ready() -> bool:
        try:
            return client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(ready, what="Prometheus")
        yield ask
    finally:
        client.close()
        process.terminate()
        process.wait(60)


def test_prometheus_and_the_boards_beside_a_service(service: Service, tmp_path: Path) -> None:
    """The exported files, a real Prometheus, and every query of every panel."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (apt: prometheus)")
    service.run.cli("metrics", "export", "--grafana", str(tmp_path), check=True)
    with started(tmp_path, free_port()) as ask:
        wait_until(lambda: ask('up{service="t"}'), what="the first scrape")
        # A rate needs two scrapes with requests between them.
        service.complete(f"{PROMPT}again", max_tokens=4)
        wait_until(lambda: ask('sum(rate(pdctl_proxy_tokens_total{service="t"}[1m])) > 0'), what="a rate")
        for board in ALL:
            for row in board.rows:
                for panel in row.panels:
                    found = [ask(filled(query.expression).replace('"demo"', '"t"')) for query in panel.queries]
                    may_be_empty = board.uid == "pdctl-rdma" or row.title in _OTHER_KINDS or panel.title in _EMPTY
                    assert may_be_empty or all(found), f"{board.uid}: {panel.title} shows nothing"
        assert ask('ALERTS{service="t"}') == [], "a healthy service fires no alert"
