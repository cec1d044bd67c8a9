"""`python -m pdctl.doctor`: inspect this node of a cluster, as its agent asks on stdin. Prints a NodeReport as JSON."""

from __future__ import annotations

import sys
from dataclasses import replace

import msgspec

from pdctl.control_api.examination_messages import NodeFinding, NodeReport
from pdctl.doctor import Area
from pdctl.doctor.inspection import Inspection, Where
from pdctl.doctor.traits import read_traits
from pdctl.topology.spec import Cluster


class Task(msgspec.Struct, frozen=True):
    """`cluster`: what this node's own file says of it; `engines`: what runs here; `text`: the topology, "" for none."""

    node: str
    address: str
    cluster: Cluster
    engines: frozenset[str]
    text: str
    source: str


def main() -> int:
    """Inspect, and print the report."""
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    sys.stdout.buffer.write(msgspec.json.encode(report(task)) + b"\n")
    return 0


def report(task: Task) -> NodeReport:
    """What is found on this machine."""
    inspection = Inspection(Where(node=task.node, engines=task.engines, is_running=True, remembers=False))
    if task.text:
        inspection.use(task.text, task.source, task.cluster)
    found = inspection.findings(tuple(area for area in Area if area is not Area.TRANSFER))
    host = replace(inspection.host, address=task.address)
    return NodeReport(
        findings=tuple(msgspec.convert(finding.to_dict(), NodeFinding) for finding in found),
        traits=read_traits(host, inspection.tree),
    )


if __name__ == "__main__":
    sys.exit(main())
