"""`pdctl plan` for several machines: the facts of each are written there, and given to the command."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pdctl import console
from pdctl.commands.common import read_topology, topology_file
from pdctl.errors import ConfigError, PdctlError

if TYPE_CHECKING:
    from pdctl.host import Host
    from pdctl.plan import Plan
    from pdctl.topology.spec import Topology

_HOW = (
    "write each node's facts there: pdctl plan --write-facts NODE.json; then: pdctl plan --facts A.json --facts B.json"
)


def names_cluster(path: Path | None) -> bool:
    """Whether the topology runs on several machines. What is wrong with a file is told when it is loaded."""
    try:
        return path is not None and "cluster" in read_topology(path)
    except PdctlError:
        return False


def write_facts(target: Path, file: Path | None) -> None:
    """Write this machine's facts. With a topology, its address is the one that [cluster] chooses."""
    from pdctl.host import read_host
    from pdctl.host.address import address_of
    from pdctl.host.facts import encode_facts
    from pdctl.plan.cluster import engine_packages
    from pdctl.topology.loader import load_imagined

    host, path = read_host(), topology_file(file)
    topology = load_imagined(path) if path is not None and names_cluster(path) else None
    if topology is not None and topology.cluster is not None:
        host = replace(host, address=address_of(topology.cluster.interface))
    try:
        target.write_bytes(encode_facts(host, engine_packages()) + b"\n")
    except OSError as failure:
        raise PdctlError(f"{target} cannot be written: {failure.strerror}") from failure
    console.out(
        f"{target}: {len(host.gpus)} GPUs, {len(host.cpus)} CPUs, {host.memory / 2**30:.0f} GiB; "
        f"it counts as node {target.stem}"
    )


def plan_nodes(path: Path, facts: list[Path]) -> tuple[Topology, dict[str, Plan]]:
    """The plan of each node. Raises ConfigError, PdctlError."""
    from pdctl.plan.cluster import place, shares_of
    from pdctl.topology.loader import check_part, load_imagined

    topology = load_imagined(path)
    if topology.cluster is None:
        raise PdctlError(f"{path} has no [cluster], and --facts is for several machines", "add [cluster] to it")
    if not facts:
        raise PdctlError(f"{path} is for several machines, and none is known", _HOW)
    hosts = _read(facts)
    for node, share in shares_of(topology, hosts, {}).items():
        try:
            check_part(topology, share.of(topology, hosts[node].address), hosts[node], is_here=False)
        except ConfigError as failure:
            problems = [replace(problem, message=f"node {node}: {problem.message}") for problem in failure.problems]
            raise ConfigError(failure.source, problems) from failure
    _warn(topology, hosts)
    return topology, place(topology, hosts)


def show_nodes(path: Path, facts: list[Path], as_json: bool) -> None:
    """Print the plan of each node."""
    topology, plans = plan_nodes(path, facts)
    if as_json:
        console.out(json.dumps({node: planned.to_dict() for node, planned in plans.items()}, indent=2))
        return
    engines = sum(spec.is_engine for planned in plans.values() for spec in planned.processes)
    console.out(f"service {topology.service.name}: {topology.service.model}; {engines} engines on {len(plans)} nodes")
    from pdctl.commands.setup.plan import rows_of

    for node, planned in plans.items():
        proxies = [spec for spec in planned.processes if spec.is_proxy]
        console.out(f"\nnode {node}: {planned.proxy_url if proxies else 'no proxy'}")
        console.out(rows_of(planned) if planned.processes else "  nothing")


def _read(files: list[Path]) -> dict[str, Host]:
    from pdctl.host.facts import decode_facts

    hosts: dict[str, Host] = {}
    for file in files:
        if file.stem in hosts:
            raise PdctlError(f"two files are named {file.stem}", "a file's name is the name of its node")
        try:
            hosts[file.stem] = decode_facts(file.read_bytes())
        except OSError as failure:
            raise PdctlError(f"{file} cannot be read: {failure.strerror}", _HOW) from failure
        except PdctlError as failure:
            raise PdctlError(f"{file}: {failure.message}", _HOW) from failure
    return hosts


def _warn(topology: Topology, hosts: dict[str, Host]) -> None:
    from pdctl.plan.cluster import unknown_nodes

    mark = console.paint("warning:", "yellow", sys.stderr)
    if unknown := unknown_nodes(topology, hosts):
        console.note(f"{mark} the topology names nodes whose facts are not given: {', '.join(unknown)}")
    addresses = [host.address for host in hosts.values()]
    if len({*addresses}) < len(addresses):
        console.note(f"{mark} some nodes have the same address: write facts with -f FILE, whose [cluster] chooses it")
