"""`pdctl doctor --all-nodes` and `pdctl doctor transfer --between`: the nodes of a cluster, asked by their agents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pdctl import console
from pdctl.commands.common import control, find_service, topology_file
from pdctl.commands.inspect import transfers
from pdctl.errors import PdctlError, Verdict
from pdctl.transports import TRANSPORTS
from pdctl.user_files import read_user_text

if TYPE_CHECKING:
    from pdctl.control_api import ControlClient
    from pdctl.control_api.examination_messages import (
        FarTransport,
        NodeExamination,
        TransferProtocol,
        TransferResult,
    )
    from pdctl.doctor import Finding
    from pdctl.doctor.transfer import Result


def all_nodes(file: Path | None, as_json: bool) -> None:
    """Print the findings of every node, then what differs between them. Raises Verdict, PdctlError."""
    from pdctl.control_api.examination_messages import ExamineOrder
    from pdctl.doctor import exit_code
    from pdctl.doctor.traits import compare

    path = topology_file(file)
    agent = _agent(path)
    if path is not None:
        order = ExamineOrder(text=read_user_text(path), source=str(path.absolute()))
    else:
        published = agent.topology()
        order = ExamineOrder(text=published.text, source=published.source)
    found = agent.examine(order)
    differences = compare(found)
    by_node = {one.node: _findings(one) for one in found.nodes}
    if as_json:
        nodes = {node: [finding.to_dict() for finding in findings] for node, findings in by_node.items()}
        compared = [finding.to_dict() for finding in differences]
        console.out(json.dumps({"schema": 1, "nodes": nodes, "differences": compared}, indent=2))
    else:
        _show(by_node, differences)
    raise Verdict(exit_code([*differences, *(finding for findings in by_node.values() for finding in findings)]))


def between(file: Path | None, nodes: tuple[str, str], only: str, protocol: str, mib: int, as_json: bool) -> None:
    """Move bytes from the first node to the second by each transport that crosses hosts. Raises Verdict, PdctlError."""
    from pdctl.control_api.examination_messages import MOST_MIB, TransferOrder
    from pdctl.doctor.transfer import exit_code

    far = [name for name, info in TRANSPORTS.items() if info.crosses_hosts]
    if only and only not in far:
        raise PdctlError(f"{only} reaches one host only", f"between hosts: {', '.join(far)}")
    if mib > MOST_MIB:
        raise PdctlError(f"--mib {mib} is too much between nodes", f"at most {MOST_MIB}")
    agent, found = _agent(topology_file(file)), []
    for name in [only] if only else far:
        console.note(f"{name}: moving {mib} MiB from {nodes[0]} to {nodes[1]} ...")
        order = TransferOrder(
            serving=nodes[0], reading=nodes[1], transport=cast("FarTransport", name),
            protocol=cast("TransferProtocol", protocol), mib=mib,
        )  # fmt: skip
        found.append(_as_row(agent.transfer(order), " to ".join(nodes)))
    if as_json:
        console.out(json.dumps({"schema": 1, "transfer": found}, indent=2))
    else:
        console.out(transfers.table(found))
    transfers.advise(found)
    raise Verdict(exit_code(found))


def _agent(path: Path | None) -> ControlClient:
    """The agent of this machine. Raises PdctlError."""
    return control(find_service(None, path))


def _as_row(result: TransferResult, pair: str) -> Result:
    """As transfers on one machine are shown."""
    import msgspec

    if result.error:
        return {"transport": result.transport, "pair": pair, "error": result.error}
    found = {name: value for name, value in msgspec.structs.asdict(result).items() if name != "error"}
    # Which link it went over, the nodes know.
    return {**found, "pair": pair, "link_gbps": None, "of_link": None}


def _findings(one: NodeExamination) -> list[Finding]:
    """A node's findings."""
    import msgspec

    from pdctl.doctor import Finding

    return (
        [msgspec.convert(msgspec.structs.asdict(found), Finding) for found in one.report.findings] if one.report else []
    )


def _show(by_node: dict[str, list[Finding]], differences: list[Finding]) -> None:
    from pdctl.doctor import Severity
    from pdctl.doctor.report import summary, text

    for node, findings in by_node.items():
        if findings:
            console.out(f"node {node}: {summary(findings)}")
            # What is well would fill a screen for each node.
            console.out(text([finding for finding in findings if finding.severity is not Severity.OK]))
            console.out()
    console.out("between the nodes:")
    console.out(text(differences))
