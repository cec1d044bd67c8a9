"""Grafana's own types accept the dashboards: `scripts/grafana-schema DIR` installs them from npm and runs this."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdctl.boards.dashboards import ALL
from pdctl.boards.panels import Dashboard, Json, Panel

_FOLDER = os.environ.get("PDCTL_GRAFANA_SCHEMA", "")
pytestmark = pytest.mark.skipif(not _FOLDER, reason="scripts/grafana-schema runs it")

# Grafana's module of each kind of panel.
_MODULES = {
    "timeseries": "timeseries/panelcfg/x/TimeSeries", "stat": "stat/panelcfg/x/Stat",
    "table": "table/panelcfg/x/Table", "state-timeline": "statetimeline/panelcfg/x/StateTimeline",
}  # fmt: skip
# In JSON, the value of an enumeration is its text.
_HEAD = """\
import type { Dashboard, GraphFieldConfig } from "@grafana/schema";
type Plain<T> = T extends string ? `${T}` : T extends number | boolean | null | undefined ? T
  : T extends readonly (infer U)[] ? Plain<U>[] : { [K in keyof T]: Plain<T[K]> };
"""


def _source(boards: tuple[Dashboard, ...]) -> Iterator[str]:
    yield _HEAD
    for kind, module in _MODULES.items():
        path = f"@grafana/schema/dist/esm/raw/composable/{module}PanelCfg_types.gen"
        yield f'import type {{ Options as {_options(kind)} }} from "{path}";'
    for board in boards:
        yield f"export const {board.uid.replace('-', '_')}: Plain<Dashboard> = {json.dumps(board.json())};"
        for row in board.rows:
            yield from map(_panel, row.panels)


def _options(kind: str) -> str:
    return f"{kind.title().replace('-', '')}Options"


def _panel(panel: Panel) -> str:
    """The parts of a panel that the type of a dashboard leaves open."""
    found: Json = panel.json(1, 0, 0)
    options = json.dumps(found["options"])
    lines = [f"(({options}) satisfies Plain<Partial<{_options(panel.kind)}>>);"]
    if panel.kind == "timeseries":
        field = found["fieldConfig"]
        assert isinstance(field, dict)
        lines.append(f"(({json.dumps(field['defaults']['custom'])}) satisfies Plain<GraphFieldConfig>);")
    return "\n".join(lines)


def compiled(boards: tuple[Dashboard, ...]) -> str:
    """What the compiler says."""
    folder = Path(_FOLDER)
    (folder / "boards.ts").write_text("\n".join(_source(boards)))
    words = ["--noEmit", "--strict", "--skipLibCheck", "--module", "esnext", "--moduleResolution", "bundler"]
    argv = [str(folder / "node_modules/.bin/tsc"), *words, "boards.ts"]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=120)
    assert (done.returncode == 0) == (not done.stdout)
    return done.stdout


def test_grafanas_types_accept_the_dashboards() -> None:
    assert compiled(ALL) == ""


def test_a_wrong_panel_is_refused() -> None:
    class Wrong(Panel):
        def json(self, number: int, x: int, y: int) -> Json:
            return {**super().json(number, x, y), "gridPos": {"x": "left"}, "options": {"legend": {"placement": "up"}}}

    row = ALL[0].rows[1]
    first = row.panels[0]
    wrong = Wrong(first.title, first.about, first.unit, first.queries)
    board = Dashboard("wrong", "wrong", "", (type(row)("", (wrong,)),))
    found = compiled((board,))
    assert "Type 'string' is not assignable to type 'number'" in found
    assert "Type '\"up\"' is not assignable" in found
