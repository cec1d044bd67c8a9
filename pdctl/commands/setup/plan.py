"""`pdctl plan`: show what `up` would start, and where. Starts nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pdctl import console
from pdctl.commands.common import FileOption, JsonOption, topology_file
from pdctl.errors import ConfigError, PdctlError

if TYPE_CHECKING:
    from pdctl.plan import Plan


def plan(
    file: Path | None = FileOption,
    facts: list[Path] = typer.Option(
        [],
        "--facts",
        help="With [cluster]: the facts of a node, from --write-facts there. The file is named like the node. Once for "
        "each node.",
    ),
    write_facts: Path | None = typer.Option(
        None, "--write-facts", help="Write this machine's facts to a file, for --facts elsewhere, and show no plan."
    ),
    as_json: bool = JsonOption,
) -> None:
    """Show the processes of a topology with roles, devices, CPU pins and ports. Starts nothing."""
    from pdctl.commands.cluster import facts as cluster

    path = topology_file(file)
    if write_facts is not None:
        cluster.write_facts(write_facts, file)
    elif path is not None and (facts or cluster.names_cluster(path)):
        cluster.show_nodes(path, facts, as_json)
    elif facts:
        raise PdctlError("--facts needs a topology file with [cluster]", "name it with -f FILE")
    else:
        _show(file, as_json)


def _show(file: Path | None, as_json: bool) -> None:
    from pdctl.host.processes.presence import supervisor_of

    planned = load_plan(file)
    if supervisor_of(Path(planned.run_dir)) is not None:
        console.note(
            f"{planned.service} is running; this plan is for a new start. To see what is running: pdctl status"
        )
    else:
        # While the service is running, its own proxy holds the port.
        planned = load_plan(file, check_port=True)
    if as_json:
        console.out(json.dumps(planned.to_dict(), indent=2))
        return
    console.out(f"service {planned.service}: {planned.model} at {planned.proxy_url}\n")
    console.out(rows_of(planned))
    console.out("")
    for spec in planned.processes:
        for what, reason in spec.why.items():
            console.out(f"{spec.name}: {what} {_shown(getattr(spec, what))}: {reason}")
    warn_of_gpus(planned)
    _expected(planned)
    if not planned.model_ready:
        path = planned.model_path
        where = f"converts the model into {path}" if path.startswith("/") else "downloads the model from the Hub"
        console.note(f"\nthe first `pdctl up` {where}")


def rows_of(planned: Plan) -> str:
    """The processes of a plan as a table."""
    rows = [
        [
            spec.name,
            spec.role,
            spec.kind,
            spec.device if not spec.gpus else ",".join(spec.gpus),
            ",".join(map(str, spec.cpus)),
            ",".join(spec.rdma) or "-",
            ",".join(_port(purpose, port) for purpose, port in spec.ports.items()),
            ",".join(spec.depends_on) or "-",
        ]
        for spec in planned.processes
    ]
    rows += [
        [spec.name, spec.role, spec.kind, "attached", "-", "-", f"{spec.host}:{spec.port}", "-"]
        for spec in planned.attached
    ]
    return console.table(["PROCESS", "ROLE", "KIND", "DEVICE", "CPUS", "RDMA", "PORT", "AFTER"], rows)


def warn_of_gpus(planned: Plan) -> None:
    """Warn about engines placed on GPUs that other processes use, or that are far from each other."""
    from pdctl.plan.pins import ACROSS_SOCKETS, IN_USE

    mark = console.paint("warning:", "yellow", sys.stderr)
    for spec in planned.processes:
        why, in_use, who = spec.why.get("gpus", "").partition(IN_USE)
        if in_use:
            console.note(f"{mark} {spec.name}: GPU {','.join(spec.gpus)} is in use by {who}")
        if ACROSS_SOCKETS in why:
            console.note(f"{mark} {spec.name}: GPUs {','.join(spec.gpus)} are {ACROSS_SOCKETS.removeprefix('; ')}")


def _expected(planned: Plan) -> None:
    """Print the expected latency, if the service has a profile for this model."""
    from pdctl.bench.profile import load, path_of
    from pdctl.commands.bench.profile import summary
    from pdctl.host.users import state_root

    found = load(path_of(state_root(), planned.service))
    if found is not None and found.model == planned.served_model_name:
        console.out(f"\nexpected latency on an idle service, from the profile of {found.date}:")
        for line in summary(found):
            console.out(f"  {line}")


def _port(purpose: str, port: int) -> str:
    return str(port) if purpose == "http" else f"{port} ({purpose})"


def _shown(value: object) -> str:
    if isinstance(value, int):
        return str(value)
    return ",".join(map(str, value)) if isinstance(value, tuple) and value else "left open"


def load_plan(file: Path | None, check_port: bool = False, running: Plan | None = None) -> Plan:
    """The plan of the topology. Processes in `running` keep their placement. Raises ConfigError with every problem."""
    from pdctl.commands.setup.default import default_text
    from pdctl.host import read_host
    from pdctl.plan import make_plan
    from pdctl.topology.loader import load_file, load_text, port_problems

    host = read_host()
    path = topology_file(file)
    topology = load_file(path, host) if path else load_text(default_text(host), "the built-in default", host)
    if check_port and (problems := port_problems(topology, host)):
        raise ConfigError(topology.source or "the topology", problems)
    return make_plan(topology, host, running)
