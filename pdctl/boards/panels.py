"""Panels and dashboards as Grafana's JSON: https://grafana.com/docs/grafana/latest/dashboards/build-dashboards/
view-dashboard-json-model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Json = dict[str, object]
Kind = Literal["timeseries", "stat", "table", "state-timeline"]

# Grafana's grid has 24 columns.
_WIDE, _HALF, _HIGH, _LOW = 24, 12, 8, 4
# The version of the JSON model that these files use: Grafana 10 and newer read it.
_SCHEMA = 39
_SOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, slots=True)
class Query:
    """One query. `legend`: with `{{label}}` for a label's value."""

    expression: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. `unit`: Grafana's name of it; `red_from`: values from here on are red; `red_below`: below here."""

    title: str
    about: str
    unit: str
    queries: tuple[Query, ...]
    kind: Kind = "timeseries"
    width: int = _HALF
    red_from: float | None = None
    red_below: float | None = None
    stacked: bool = False

    @property
    def height(self) -> int:
        """In Grafana's rows."""
        return _LOW if self.kind == "stat" else _HIGH

    def json(self, number: int, x: int, y: int) -> Json:
        """The panel at a place of the grid."""
        return {
            "id": number, "title": self.title, "description": self.about, "type": self.kind, "datasource": _SOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "fieldConfig": {"defaults": self._field(), "overrides": []},
            "options": self._options(),
            "targets": [
                {
                    "refId": chr(ord("A") + index), "datasource": _SOURCE, "expr": query.expression,
                    "legendFormat": query.legend, "editorMode": "code", "range": self.kind != "table",
                    "instant": self.kind == "table", "format": "table" if self.kind == "table" else "time_series",
                }
                for index, query in enumerate(self.queries)
            ],
        }  # fmt: skip

    def _field(self) -> Json:
        steps: list[Json] = [{"color": "green", "value": None}]
        if self.red_from is not None:
            steps.append({"color": "red", "value": self.red_from})
        if self.red_below is not None:
            steps = [{"color": "red", "value": None}, {"color": "green", "value": self.red_below}]
        custom: Json = {}
        if self.kind == "timeseries":
            custom = {
                "lineWidth": 1, "fillOpacity": 20 if self.stacked else 8, "showPoints": "never", "spanNulls": False,
                "stacking": {"mode": "normal" if self.stacked else "none", "group": "A"},
            }  # fmt: skip
        return {
            "unit": self.unit, "min": 0, "thresholds": {"mode": "absolute", "steps": steps}, "custom": custom,
            "color": {"mode": "thresholds" if self.kind in ("stat", "state-timeline") else "palette-classic"},
        }  # fmt: skip

    def _options(self) -> Json:
        if self.kind == "stat":
            return {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "graphMode": "area"}
        if self.kind == "timeseries":
            calcs = ["mean", "max", "lastNotNull"]
            legend = {"showLegend": True, "displayMode": "table", "placement": "bottom", "calcs": calcs}
            return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
        return {"showHeader": True} if self.kind == "table" else {"mergeValues": True, "showValue": "never"}


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One dashboard. `by_engine`: it has a variable that selects engines, whose names are values of this metric."""

    uid: str
    title: str
    about: str
    rows: tuple[Row, ...]
    by_engine: str = ""

    def json(self) -> Json:
        """The dashboard as Grafana imports it."""
        return {
            "uid": self.uid, "title": self.title, "description": self.about, "tags": ["pdctl"], "timezone": "browser",
            "schemaVersion": _SCHEMA, "version": 1, "editable": True, "refresh": "10s", "graphTooltip": 1,
            "time": {"from": "now-1h", "to": "now"}, "annotations": {"list": []},
            "links": [
                {"type": "dashboards", "tags": ["pdctl"], "title": "pdctl", "asDropdown": True, "includeVars": True,
                 "keepTime": True, "targetBlank": False, "icon": "external link", "tooltip": ""},
            ],
            "templating": {"list": self._variables()}, "panels": placed(self.rows),
        }  # fmt: skip

    def _variables(self) -> list[Json]:
        found: list[Json] = [
            {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
            _variable("service", "Service", "label_values(pdctl_proxy_waiting, service)"),
        ]
        if self.by_engine:
            query = f'label_values({self.by_engine}{{service="$service"}}, engine)'
            found.append({**_variable("engine", "Engine", query), "multi": True, "includeAll": True, "allValue": ".*"})
        return found


def _variable(name: str, label: str, query: str) -> Json:
    return {
        "name": name, "label": label, "type": "query", "datasource": _SOURCE, "query": {"query": query, "refId": name},
        "refresh": 2, "sort": 1,
    }  # fmt: skip


def placed(rows: Sequence[Row]) -> list[Json]:
    """The panels with their places: from left to right, then down."""
    found: list[Json] = []
    y = 0
    for row in rows:
        found.append(
            {"id": len(found) + 1, "type": "row", "title": row.title, "collapsed": False, "panels": [],
             "gridPos": {"x": 0, "y": y, "w": _WIDE, "h": 1}}
        )  # fmt: skip
        x, y, highest = 0, y + 1, 0
        for panel in row.panels:
            if x + panel.width > _WIDE:
                x, y, highest = 0, y + highest, 0
            found.append(panel.json(len(found) + 1, x, y))
            x, highest = x + panel.width, max(highest, panel.height)
        y += highest
    return found
