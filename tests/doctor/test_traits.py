"""What nodes of a cluster have in common, and what not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec

from pdctl.control_api.examination_messages import (
    ClusterExamination,
    NodeExamination,
    NodeReport,
    NodeTraits,
    RdmaPort,
)
from pdctl.doctor.traits import compare, read_traits
from pdctl.host import read_host
from pdctl.host.devices.rdma import read_tree
from tests.doctor.trees import TREES

SAME = NodeTraits(
    pdctl="1.0", kernel="6.1", driver="550.1", mtu=1500, packages={"torch": "2.9", "nixl": "0.7"},
    rdma={"mlx5_0:1": RdmaPort(link_layer="Ethernet", mtu=9000, gid_index=3)},
)  # fmt: skip


def examined(*nodes: NodeTraits | str, clock_s: float = 0.0) -> ClusterExamination:
    """Nodes a, b, ...: each its traits, or why it has none. `clock_s`: of the last one."""
    found = []
    for name, node in zip("abcdef", nodes, strict=False):
        if isinstance(node, str):
            found.append(NodeExamination(node=name, reason=node))
        else:
            found.append(NodeExamination(node=name, report=NodeReport(findings=(), traits=node), clock_s=0.0))
    found[-1] = msgspec.structs.replace(found[-1], clock_s=clock_s, clock_error_s=0.2)
    return ClusterExamination(nodes=tuple(found))


def said(found: ClusterExamination) -> dict[str, str]:
    return {f.id: f"{f.severity.value} {f.subject}: {f.observed}" for f in compare(found)}


def other(**changes: object) -> NodeTraits:
    return msgspec.structs.replace(SAME, **changes)


def test_nodes_that_are_the_same() -> None:
    assert said(examined(SAME, SAME, SAME, clock_s=1.1)) == {
        "nodes.same": "ok a, b, c: versions, MTU and clocks are the same"
    }


def test_versions_that_differ() -> None:
    found = said(examined(SAME, other(pdctl="1.1", kernel="6.2", driver="560", ofed="24.10"), SAME))
    assert found == {
        "nodes.pdctl": "warning pdctl: a, c: 1.0; b: 1.1",
        "nodes.kernel": "info kernel: a, c: 6.1; b: 6.2",
        "nodes.driver": "warning NVIDIA driver: a, c: 550.1; b: 560",
        "nodes.ofed": "warning network drivers: a, c: the kernel's; b: 24.10",
    }
    assert said(examined(SAME, other(packages={"torch": "2.8"}))) == {"nodes.package": "warning torch: a: 2.9; b: 2.8"}
    assert "nodes.same" in said(examined(SAME, other(driver="", packages={}))), "a node without a GPU is no fault"


def test_networks_that_differ() -> None:
    assert said(examined(SAME, other(mtu=9000))) == {"nodes.mtu": "warning cluster.interface: a: 1500; b: 9000"}
    smaller = {"mlx5_0:1": RdmaPort(link_layer="Ethernet", mtu=1500, gid_index=5)}
    assert said(examined(SAME, other(rdma=smaller))) == {
        "nodes.mtu": "warning RDMA ports: a: 9000; b: 1500",
        "nodes.gid_index": "warning RoCE v2 GID: a: 3; b: 5",
    }
    infiniband = {"mlx5_0:1": RdmaPort(link_layer="InfiniBand", mtu=0, gid_index=None)}
    assert said(examined(SAME, other(rdma=infiniband), SAME)) == {
        "nodes.link_layer": "critical RDMA ports: a, c: Ethernet; b: InfiniBand"
    }
    assert "nodes.same" in said(examined(SAME, other(rdma={}))), "whether RDMA is needed, each node says itself"


def test_clocks_and_nodes_that_do_not_answer() -> None:
    assert said(examined(SAME, SAME, clock_s=-3.0)) == {
        "nodes.clock": "warning b: its clock is 3.0 s behind that of the asked node"
    }
    assert said(examined(SAME, "no answer")) == {"nodes.silent": "critical b: no answer"}


def test_traits_of_this_machine_and_of_a_tree(tmp_path: Path) -> None:
    TREES["two devices"](tmp_path)
    (tmp_path / "module/mlx5_core").mkdir(parents=True, exist_ok=True)
    (tmp_path / "module/mlx5_core/version").write_text("24.10-1.1.4\n")
    host = replace(read_host(), address="127.0.0.1", package_in=lambda python, names: (names[0], "1.2"), python="/x")
    found = read_traits(host, read_tree(tmp_path), tmp_path)
    assert found.ofed == "24.10-1.1.4"
    assert found.driver == ""
    assert found.packages["torch"] == "1.2"
    assert found.rdma
    assert {port.link_layer for port in found.rdma.values()} <= {"InfiniBand", "Ethernet"}
    here = read_traits(replace(read_host(), address="127.0.0.1"), read_tree())
    assert here.mtu > 1000, "of lo"
