"""Prometheus' own tool checks the configuration, every query, and that each alert fires when it should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pdctl.boards.alerts import alerts
from pdctl.boards.stack import Target, files
from tests.boards.test_boards import QUERIES

pytestmark = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (apt: prometheus)")

_VARIABLES = {"$service": "demo", "$engine": ".*", "$__rate_interval": "1m", "$__range": "1h"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in files(Target("demo", "http://127.0.0.1:8000"), 0.99).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def promtool(folder: Path, *words: str) -> str:
    done = subprocess.run(["promtool", *words], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def filled(expression: str) -> str:
    """A query as Grafana sends it."""
    for name, value in _VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    return expression


def test_the_configuration_and_the_rules_are_accepted(folder: Path) -> None:
    assert f"{len(alerts(0.99))} rules found" in promtool(folder, "check", "config", "prometheus.yml")


def test_every_query_of_the_boards_is_promql(folder: Path) -> None:
    rules = [{"record": f"panel:{n}", "expr": filled(str(query.values[0]))} for n, query in enumerate(QUERIES)]
    (folder / "panels.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(QUERIES)} rules found" in promtool(folder, "check", "rules", "panels.yml")


def series(text: str, *values: float) -> dict[str, str]:
    """Series with one value a minute."""
    return {"series": text, "values": " ".join(map(str, values))}


def counted(text: str, by: float, minutes: int) -> dict[str, str]:
    return {"series": text, "values": f"0+{by:g}x{minutes}"}


# By alert: series with which it fires at the minute given, the labels that it then has, and series with which it does
# not.
_CASES: dict[str, tuple[list[dict[str, str]], int, dict[str, str], list[dict[str, str]]]] = {
    "PdctlKvLeaked": (
        [series('pdctl_engine_block_seconds_total{engine="e",what="leaked"}', 0, 0, 3, 3)], 3,
        {"engine": "e", "what": "leaked"},
        [series('pdctl_engine_block_seconds_total{engine="e",what="leaked"}', 0, 0, 0, 0),
         series('pdctl_engine_block_seconds_total{engine="e",what="leased"}', 0, 5, 9, 20)],
    ),
    "PdctlTransportFallback": (
        [series('pdctl_link_fallback{prefill="p",decode="d"}', 1, 1, 1)], 2, {"prefill": "p", "decode": "d"},
        [series('pdctl_link_fallback{prefill="p",decode="d"}', 0, 0, 0)],
    ),
    "PdctlNoLink": (
        [series('pdctl_link_up{prefill="p",decode="d"}', 0, 0, 0, 0)], 3, {"prefill": "p", "decode": "d"},
        [series('pdctl_link_up{prefill="p",decode="d"}', 1, 0, 1, 0)],
    ),
    "PdctlCrashLoop": (
        [series('pdctl_process_restarts_total{process="x"}', 0, 1, 2, 3, 4)], 4, {"process": "x"},
        [series('pdctl_process_restarts_total{process="x"}', 0, 1, 1, 1, 1)],
    ),
    "PdctlProcessFailed": (
        [series('pdctl_process_state{process="x",state="failed"}', 1, 1)], 1, {"process": "x", "state": "failed"},
        [series('pdctl_process_state{process="x",state="stopped"}', 1, 1)],
    ),
    "PdctlSourceSilent": (
        [series('pdctl_scrape_ok{source="e"}', 0, 0, 0)], 2, {"source": "e"},
        [series('pdctl_scrape_ok{source="e"}', 0, 1, 0)],
    ),
    "PdctlDown": (
        [series('up{job="pdctl",service="s"}', 0, 0)], 1, {"job": "pdctl", "service": "s"},
        [series('up{job="other",service="s"}', 0, 0)],
    ),
    "PdctlRdmaSymbolErrors": (
        [counted('pdctl_rdma_events_total{device="d",port="1",counter="symbol_error"}', 10, 60)], 60,
        {"device": "d", "port": "1", "counter": "symbol_error"},
        [counted('pdctl_rdma_events_total{device="d",port="1",counter="symbol_error"}', 1, 60)],
    ),
    "PdctlRdmaLinkDowned": (
        [series('pdctl_rdma_events_total{device="d",port="1",counter="link_downed"}', 0, 0, 1)], 2,
        {"device": "d", "port": "1", "counter": "link_downed"},
        [series('pdctl_rdma_events_total{device="d",port="1",counter="link_downed"}', 7, 7, 7)],
    ),
    "PdctlTtftBurnFast": (
        [counted('pdctl_proxy_requests_total{service="s",status="200"}', 100, 90),
         counted('pdctl_proxy_slo_met_total{service="s",target="ttft"}', 80, 90)], 70, {"service": "s"},
        [counted('pdctl_proxy_requests_total{service="s",status="200"}', 100, 90),
         counted('pdctl_proxy_slo_met_total{service="s",target="ttft"}', 95, 90)],
    ),
    "PdctlTtftBurnSlow": (
        [counted('pdctl_proxy_requests_total{service="s",status="200"}', 100, 400),
         counted('pdctl_proxy_slo_met_total{service="s",target="ttft"}', 92, 400)], 370, {"service": "s"},
        [counted('pdctl_proxy_requests_total{service="s",status="200"}', 100, 400),
         counted('pdctl_proxy_slo_met_total{service="s",target="ttft"}', 99, 400)],
    ),
}  # fmt: skip


# What the alerts' texts say of the value.
_VALUES = {"PdctlCrashLoop": "4", "PdctlTtftBurnFast": "20%", "PdctlTtftBurnSlow": "8%"}


def test_every_alert_has_a_case() -> None:
    assert set(_CASES) == {alert.name for alert in alerts(0.99)}


@pytest.mark.parametrize("name", _CASES)
def test_an_alert_fires_when_it_should(folder: Path, name: str) -> None:
    bad, minute, labels, good = _CASES[name]
    alert = next(alert for alert in alerts(0.99) if alert.name == name)

    def case(inputs: list[dict[str, str]], expected: list[dict[str, Any]]) -> dict[str, Any]:
        rule = {"eval_time": f"{minute}m", "alertname": name, "exp_alerts": expected}
        return {"interval": "1m", "input_series": inputs, "alert_rule_test": [rule]}

    def told(text: str) -> str:
        text = re.sub(r"{{ \$labels\.(\w+) }}", lambda found: labels[found[1]], text)
        return re.sub(r"{{ \$value \|[^}]*}}", _VALUES.get(name, ""), text)

    fired = {
        "exp_labels": {**labels, "severity": alert.severity},
        "exp_annotations": {"summary": told(alert.summary), "command": told(alert.look)},
    }
    cases = [case(bad, [fired]), case(good, [])]
    (folder / "cases.yml").write_text(json.dumps({"rule_files": ["rules.yml"], "tests": cases}))
    promtool(folder, "test", "rules", "cases.yml")
