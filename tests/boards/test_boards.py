"""Boards and alerts: every name and label exists in the code, and the files are what Grafana and Prometheus read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdctl.boards.alerts import alerts
from pdctl.boards.dashboards import ALL
from pdctl.boards.panels import Dashboard, Panel, placed
from pdctl.boards.stack import Target, files
from tests.boards.known import known

KNOWN = known()
_SELECTOR = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\{([^}]*)\}")
_WORDS = {"sum", "by", "rate", "increase", "histogram_quantile", "and"}

QUERIES = [
    pytest.param(query.expression, query.legend, id=f"{board.uid}: {panel.title}: {query.legend}")
    for board in ALL
    for row in board.rows
    for panel in row.panels
    for query in panel.queries
]
ALERTS = alerts(0.99)


def selectors(expression: str) -> list[tuple[str, set[str]]]:
    """The metrics of an expression, and the labels that it selects by."""
    found = [
        (name, {pair.partition("=")[0].rstrip("!") for pair in labels.split(",") if pair})
        for name, labels in _SELECTOR.findall(expression)
    ]
    rest = re.sub(r"by \([^)]*\)|\[[^]]*\]", " ", _SELECTOR.sub(" ", expression))
    return found + [(name, set()) for name in re.findall(r"\b[a-z_][a-z0-9_:]*\b(?!\()", rest) if name not in _WORDS]


def kept(expression: str) -> set[str]:
    """The labels that the result of an expression has."""
    common = set.intersection(*(KNOWN[name] for name, _ in selectors(expression)))
    if (grouped := re.search(r"sum by \(([^)]*)\)", expression)) is not None:
        return set(grouped[1].split(", ")) - {"le"}
    return set() if "sum(" in expression else common


def check_names(expression: str) -> None:
    used = selectors(expression)
    assert used
    for name, labels in used:
        assert name in KNOWN, f"no metric is called {name}"
        assert labels <= KNOWN[name], f"{name} has no label {labels - KNOWN[name]}"
    for group in re.findall(r"by \(([^)]*)\)", expression):
        for name, _ in used:
            assert set(group.split(", ")) <= KNOWN[name], f"{name} has no label of {group}"


@pytest.mark.parametrize(("expression", "legend"), QUERIES)
def test_a_panel_uses_metrics_and_labels_that_exist(expression: str, legend: str) -> None:
    check_names(expression)
    assert all('service="$service"' in part for part in re.findall(r"\{[^}]*\}", expression)), "of one service only"
    assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= kept(expression)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_an_alert_uses_metrics_and_labels_that_exist(alert: Any) -> None:
    check_names(alert.expression)
    assert set(re.findall(r"\$labels\.(\w+)", f"{alert.summary} {alert.look}")) <= kept(alert.expression)


@pytest.mark.parametrize(
    "expression",
    ["rate(pdctl_proxy_nonsense_total{service=\"x\"}[5m])", "sum by (nonsense) (pdctl_link_up{service=\"x\"})",
     "pdctl_link_up{nonsense=\"x\"}", "pdctl_nonsense == 1"],
)  # fmt: skip
def test_a_wrong_name_is_found(expression: str) -> None:
    with pytest.raises(AssertionError):
        check_names(expression)


DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", sorted(name for name in KNOWN if name.startswith("pdctl_")))
def test_a_metric_is_documented(name: str) -> None:
    """By its name, or by the last part of it beside another one."""
    stem = re.sub("_(bucket|sum|count|total)$", "", name)
    said = [stem, *(stem[at:] for at in range(len("pdctl"), len(stem)) if stem[at] == "_")]
    text = (DOCS / "metrics.md").read_text()
    assert any(re.search(rf"`{part}(_total)?[`{{]", text) for part in said)


def test_every_alert_is_documented() -> None:
    text = (DOCS / "observability.md").read_text()
    assert all(f"`{alert.name}`" in text for alert in ALERTS)


def panels(board: Dashboard) -> Iterator[Panel]:
    for row in board.rows:
        yield from row.panels


@pytest.mark.parametrize("board", ALL, ids=lambda board: board.uid)
def test_a_dashboard_is_complete(board: Dashboard) -> None:
    found: Any = board.json()
    assert json.loads(json.dumps(found)) == found
    names = {variable["name"] for variable in found["templating"]["list"]}
    text = json.dumps(found)
    # Grafana's own variables begin with two underscores.
    assert set(re.findall(r"\$\{?([a-z]\w*)", text)) <= names, "every variable is defined"
    assert ("$engine" in text) == ("engine" in names), "and used"
    queried = [v["query"]["query"] for v in found["templating"]["list"] if v["type"] == "query"]
    assert queried
    for query in queried:
        name, label = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", query).groups()  # type: ignore[union-attr]
        assert label in KNOWN[name]
    ids = [panel["id"] for panel in found["panels"]]
    assert len(ids) == len(set(ids))
    assert {panel["title"] for panel in found["panels"]} >= {panel.title for panel in panels(board)}


@pytest.mark.parametrize("board", ALL, ids=lambda board: board.uid)
def test_no_panel_covers_another(board: Dashboard) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in placed(board.rows):
        at: Any = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells


def read(text: str) -> Any:
    """A written YAML file: JSON below a comment."""
    return json.loads(text.partition("\n")[2])


def test_the_files_of_a_service() -> None:
    found = files(Target("demo", "http://127.0.0.1:8000"), 0.99)
    scrape: Any = read(found["prometheus.yml"])["scrape_configs"][0]
    assert scrape["static_configs"] == [{"targets": ["127.0.0.1:8000"], "labels": {"service": "demo"}}]
    assert "tls_config" not in scrape
    compose: Any = read(found["compose.yaml"])
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            known_file = any(name == source[2:] or name.startswith(f"{source[2:]}/") for name in found)
            assert known_file if source.startswith("./") else source in compose["volumes"]
    dashboards: Any = read(found["grafana/provisioning/dashboards/pdctl.yml"])
    mounted = [volume for volume in compose["services"]["grafana"]["volumes"] if "dashboards" in volume]
    assert dashboards["providers"][0]["options"]["path"] in mounted[0]
    sources: Any = read(found["grafana/provisioning/datasources/pdctl.yml"])
    assert sources["datasources"][0]["type"] == "prometheus"


def test_a_service_with_tls_is_scraped_with_its_certificate() -> None:
    found = files(Target("demo", "https://127.0.0.1:8000", "PEM"), 0.99)
    scrape: Any = read(found["prometheus.yml"])["scrape_configs"][0]
    assert scrape["scheme"] == "https"
    assert found[scrape["tls_config"]["ca_file"]] == "PEM"
    assert "proxy.pem" in found["compose.yaml"]
