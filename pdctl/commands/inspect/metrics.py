"""`pdctl metrics`: dashboards, scrape configuration and alert rules for a service's metrics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pdctl import console
from pdctl.commands.common import FileOption, ServiceOption, control, find_service
from pdctl.errors import NotRunning, PdctlError

if TYPE_CHECKING:
    from pdctl.boards.stack import Target

app = typer.Typer(help="Dashboards and alerts for a service's metrics.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Dashboards and alerts for a service's metrics."""


@app.command()
def export(
    grafana: Path = typer.Option(..., "--grafana", metavar="DIR", help="Folder for the files; created if missing."),
    objective: float = typer.Option(
        0.99, "--ttft-objective", min=0.5, max=0.99999,
        help="Fraction of answers that must meet slo.ttft_ms; the burn-rate alerts use it.",
    ),
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
) -> None:  # fmt: skip
    """Write Grafana dashboards, Prometheus' scrape configuration and alert rules, and files that start both."""
    from pdctl.boards.stack import files

    target = _target(file, service)
    written = files(target, objective)
    try:
        for name, text in written.items():
            path = grafana / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (grafana / "start.sh").chmod(0o755)
    except OSError as failure:
        raise PdctlError(f"{failure.filename} cannot be written: {failure.strerror}") from failure
    console.note(f"{len(written)} files in {grafana} for service {target.service} at {target.url}/metrics")
    console.note(
        f"start Prometheus and Grafana with: docker compose -f {grafana}/compose.yaml up    or: {grafana}/start.sh"
    )


def _target(file: Path | None, service: str | None) -> Target:
    """The running service, else the topology's."""
    from pdctl.boards.stack import Target

    try:
        found = control(find_service(service, file)).status(measurements=False)
        name, url, certificate = found.service, found.proxy_url, found.tls_cert
    except NotRunning:
        if service is not None and file is None:
            raise
        from pdctl.commands.setup.plan import load_plan

        planned = load_plan(file)
        name, url, certificate = planned.service, planned.proxy_url, planned.proxy.tls_cert
    return Target(name, url, _text(certificate))


def _text(certificate: str) -> str:
    try:
        return Path(certificate).read_text() if certificate else ""
    except OSError as failure:
        raise PdctlError(f"{certificate} cannot be read: {failure.strerror}") from failure
