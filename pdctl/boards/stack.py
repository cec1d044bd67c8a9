"""The files of `pdctl metrics export`: Prometheus, Grafana, and what starts both beside a service."""

from __future__ import annotations

import json
from dataclasses import dataclass
from urllib.parse import urlsplit

from pdctl.boards.alerts import Alert, alerts
from pdctl.boards.dashboards import ALL
from pdctl.boards.panels import Json

_PROMETHEUS, _GRAFANA = "http://127.0.0.1:9090", 3000
# A scrape may take as long as its slowest source, which has one second.
_INTERVAL, _TIMEOUT = "5s", "4s"
_HEAD = "# Written by pdctl metrics export. Write it again after an update of pdctl.\n"
_CERTIFICATE = "proxy.pem"


@dataclass(frozen=True, slots=True)
class Target:
    """A service to watch. `url`: its proxy; `certificate`: the text of its own certificate, "" without TLS."""

    service: str
    url: str
    certificate: str = ""

    @property
    def address(self) -> str:
        """Host and port."""
        return urlsplit(self.url).netloc


def files(target: Target, objective: float) -> dict[str, str]:
    """Every file by its path below the folder. `objective`: the part of answers that must meet slo.ttft_ms."""
    found = {
        "prometheus.yml": _yaml(scrape_configuration(target)),
        "rules.yml": _yaml(rules(alerts(objective))),
        "grafana/provisioning/datasources/pdctl.yml": _yaml(_data_source()),
        "grafana/provisioning/dashboards/pdctl.yml": _yaml(_provider("/etc/pdctl/dashboards")),
        "compose.yaml": _yaml(_compose(bool(target.certificate))),
        "start.sh": _START,
    }
    if target.certificate:
        found[_CERTIFICATE] = target.certificate
    for board in ALL:
        found[f"grafana/dashboards/{board.uid}.json"] = _json(board.json())
    return found


def _json(value: Json) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _yaml(value: Json) -> str:
    """JSON is YAML, too."""
    return _HEAD + _json(value)


def scrape_configuration(target: Target) -> Json:
    """Prometheus' configuration: one address for the whole service."""
    job: Json = {
        "job_name": "pdctl",
        "scrape_interval": _INTERVAL,
        "scrape_timeout": _TIMEOUT,
        "metrics_path": "/metrics",
        "static_configs": [{"targets": [target.address], "labels": {"service": target.service}}],
    }
    if target.url.startswith("https:"):
        tls: Json = {"ca_file": _CERTIFICATE} if target.certificate else {}
        job |= {"scheme": "https", "tls_config": tls}
    return {"rule_files": ["rules.yml"], "scrape_configs": [job]}


def rules(found: tuple[Alert, ...]) -> Json:
    """Alert rules in Prometheus' format."""
    return {
        "groups": [
            {
                "name": "pdctl",
                "rules": [
                    {
                        "alert": alert.name,
                        "expr": alert.expression,
                        "for": alert.lasts,
                        "labels": {"severity": alert.severity},
                        "annotations": {"summary": alert.summary, "command": alert.look},
                    }
                    for alert in found
                ],
            }
        ]
    }


def _data_source() -> Json:
    source: Json = {
        "name": "Prometheus", "uid": "pdctl-prometheus", "type": "prometheus", "access": "proxy", "url": _PROMETHEUS,
        "isDefault": True, "jsonData": {"timeInterval": _INTERVAL},
    }  # fmt: skip
    return {"apiVersion": 1, "datasources": [source]}


def _provider(folder: str) -> Json:
    provider: Json = {"name": "pdctl", "folder": "pdctl", "type": "file", "options": {"path": folder}}
    return {"apiVersion": 1, "providers": [provider]}


def _compose(has_certificate: bool) -> Json:
    """Containers in the host's network, because a service listens on loopback by default."""
    settings = ["./prometheus.yml:/etc/prometheus/prometheus.yml:ro", "./rules.yml:/etc/prometheus/rules.yml:ro"]
    if has_certificate:
        settings.append(f"./{_CERTIFICATE}:/etc/prometheus/{_CERTIFICATE}:ro")
    return {
        "services": {
            "prometheus": {
                "image": "docker.io/prom/prometheus:v3.5.0",
                "network_mode": "host",
                "command": [
                    "--config.file=/etc/prometheus/prometheus.yml", "--web.listen-address=127.0.0.1:9090",
                    "--storage.tsdb.retention.time=15d",
                ],
                "volumes": [*settings, "prometheus:/prometheus"],
                "restart": "unless-stopped",
            },
            "grafana": {
                "image": "docker.io/grafana/grafana:12.1.0",
                "network_mode": "host",
                "environment": {"GF_SERVER_HTTP_ADDR": "127.0.0.1", "GF_SERVER_HTTP_PORT": str(_GRAFANA)},
                "volumes": [
                    "./grafana/provisioning:/etc/grafana/provisioning:ro",
                    "./grafana/dashboards:/etc/pdctl/dashboards:ro",
                    "grafana:/var/lib/grafana",
                ],
                "restart": "unless-stopped",
            },
        },
        "volumes": {"prometheus": {}, "grafana": {}},
    }  # fmt: skip


_START = """\
#!/bin/sh
# Written by pdctl metrics export. Starts Prometheus, and Grafana if it is installed, until Ctrl-C, without containers.
# DATA: where both keep their data. PORT: Prometheus' port. GRAFANA_HOME: where Grafana is installed.
set -eu
cd "$(dirname "$0")"
data=${DATA:-$PWD/data}
port=${PORT:-9090}
command -v prometheus >/dev/null || {
  echo "start.sh: prometheus is not installed; with Docker or Podman use: docker compose up" >&2
  exit 1
}
mkdir -p "$data/prometheus" "$data/grafana" "$data/provisioning/datasources" "$data/provisioning/dashboards"
pids=
trap 'trap - INT TERM EXIT; kill $pids 2>/dev/null || true; wait' INT TERM EXIT
prometheus --config.file=prometheus.yml --storage.tsdb.path="$data/prometheus" \\
  --web.listen-address="127.0.0.1:$port" &
pids=$!
if command -v grafana >/dev/null; then
  sed "s|127.0.0.1:9090|127.0.0.1:$port|" grafana/provisioning/datasources/pdctl.yml \\
    >"$data/provisioning/datasources/pdctl.yml"
  sed "s|/etc/pdctl/dashboards|$PWD/grafana/dashboards|" grafana/provisioning/dashboards/pdctl.yml \\
    >"$data/provisioning/dashboards/pdctl.yml"
  GF_SERVER_HTTP_ADDR=127.0.0.1 GF_PATHS_DATA="$data/grafana" GF_PATHS_PROVISIONING="$data/provisioning" \\
    grafana server --homepath "${GRAFANA_HOME:-/usr/share/grafana}" &
  pids="$pids $!"
else
  echo "start.sh: grafana is not installed; Prometheus alone answers at http://127.0.0.1:$port" >&2
fi
wait
"""
