"""What should be the same on all nodes of a cluster: read on each, and compared where the user asks."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pdctl import __version__
from pdctl.control_api.examination_messages import ClusterExamination, NodeExamination, NodeTraits, RdmaPort
from pdctl.doctor import Finding, Severity
from pdctl.host import Host
from pdctl.host.address import interface_of
from pdctl.host.devices.rdma import Port, RdmaTree

Value = TypeVar("Value", str, int)
Traits = Mapping[str, NodeTraits]

# A difference in one of these changes what engines compute, or what they can exchange.
PACKAGES = (
    "torch", "transformers", "vllm", "sglang", "lmdeploy", "mooncake-transfer-engine",
    "mooncake-transfer-engine-non-cuda", "nixl", "nixl-cu12",
)  # fmt: skip
# Clocks that differ by more make merged logs wrong, and at last certificates, seconds.
_CLOCK_S = 1.0
_SAME = "the same on all nodes"


def read_traits(host: Host, tree: RdmaTree, sysfs_root: Path = Path("/sys")) -> NodeTraits:
    """Read this machine's. `tree`: its RDMA devices."""
    packages = {name: host.package_in(host.python, (name,)) for name in PACKAGES} if host.python else {}
    ports = [port for device in tree.devices for port in device.ports if port.state == "ACTIVE"]
    return NodeTraits(
        pdctl=__version__,
        kernel=os.uname().release,
        driver=_line(sysfs_root / "module/nvidia/version"),
        ofed=_line(sysfs_root / "module/mlx5_core/version"),
        mtu=_mtu(sysfs_root, interface_of(host.address)),
        packages={name: found[1] for name, found in packages.items() if found is not None},
        rdma={port.subject: _rdma_port(port, sysfs_root) for port in ports},
    )


def compare(found: ClusterExamination) -> list[Finding]:
    """What differs between nodes that should be the same."""
    traits = {one.node: one.report.traits for one in found.nodes if one.report is not None}
    differences = [*silent(found.nodes), *clocks(found.nodes), *(each for one in CHECKS for each in one(traits))]
    if not differences:
        names = ", ".join(traits)
        differences.append(Finding("nodes.same", Severity.OK, names, "versions, MTU and clocks are the same"))
    return differences


def silent(nodes: Sequence[NodeExamination]) -> Iterator[Finding]:
    """Nodes without a report."""
    for one in nodes:
        if one.report is None:
            yield Finding(
                "nodes.silent", Severity.CRITICAL, one.node, one.reason, "a report of its agent", "",
                "nothing is known of it", f"on node {one.node}: pdctl agent, or pdctl doctor",
            )  # fmt: skip


def clocks(nodes: Sequence[NodeExamination]) -> Iterator[Finding]:
    """Clocks that differ from that of the asked node."""
    for one in nodes:
        if one.clock_s is not None and abs(one.clock_s) - one.clock_error_s > _CLOCK_S:
            way = "ahead of" if one.clock_s > 0 else "behind"
            yield Finding(
                "nodes.clock", Severity.WARNING, one.node,
                f"its clock is {abs(one.clock_s):.1f} s {way} that of the asked node", f"at most {_CLOCK_S:g} s",
                f"measured within {one.clock_error_s * 1000:.0f} ms",
                "times in logs do not match, and new certificates may not be valid yet", "timesyncd or chrony",
            )  # fmt: skip


def versions(traits: Traits) -> Iterator[Finding]:
    """Versions of pdctl and of the engines' packages."""
    if shown := _differing({node: one.pdctl for node, one in traits.items()}):
        yield Finding(
            "nodes.pdctl", Severity.WARNING, "pdctl", shown, _SAME, "",
            "agents of different versions may not understand each other", "the same version on all nodes",
        )  # fmt: skip
    for name in PACKAGES:
        if shown := _differing({node: one.packages[name] for node, one in traits.items() if name in one.packages}):
            yield Finding(
                "nodes.package", Severity.WARNING, name, shown, _SAME, "",
                "engines may compute different tokens, or not be able to exchange KV", "the same version on all nodes",
            )  # fmt: skip


def drivers(traits: Traits) -> Iterator[Finding]:
    """Kernels and drivers."""
    if shown := _differing({node: one.driver for node, one in traits.items() if one.driver}):
        yield Finding(
            "nodes.driver", Severity.WARNING, "NVIDIA driver", shown, _SAME, "/sys/module/nvidia/version",
            "engines may behave differently", "the same driver on all nodes",
        )  # fmt: skip
    if shown := _differing({node: one.ofed or "the kernel's" for node, one in traits.items() if one.rdma}):
        yield Finding(
            "nodes.ofed", Severity.WARNING, "network drivers", shown, _SAME, "/sys/module/mlx5_core/version",
            "RDMA may work in one direction only", "the same drivers on all nodes",
        )  # fmt: skip
    if shown := _differing({node: one.kernel for node, one in traits.items()}):
        yield Finding("nodes.kernel", Severity.INFO, "kernel", shown, _SAME)


def mtu(traits: Traits) -> Iterator[Finding]:
    """MTUs of the interfaces that nodes listen on, and of those behind RDMA ports."""
    listening = {node: one.mtu for node, one in traits.items() if one.mtu}
    behind = {
        node: min(found) for node, one in traits.items() if (found := [p.mtu for p in one.rdma.values() if p.mtu])
    }
    for subject, sizes in (("cluster.interface", listening), ("RDMA ports", behind)):
        if shown := _differing(sizes):
            yield Finding(
                "nodes.mtu", Severity.WARNING, subject, shown, _SAME, "/sys/class/net",
                "large packets of one node are lost at another: connections open, and then hang", "ip link set mtu",
            )  # fmt: skip


def fabric(traits: Traits) -> Iterator[Finding]:
    """RDMA ports that cannot reach each other, or need different settings."""
    ports = {node: one.rdma.values() for node, one in traits.items() if one.rdma}
    if shown := _differing({node: "+".join(sorted({p.link_layer for p in found})) for node, found in ports.items()}):
        yield Finding(
            "nodes.link_layer", Severity.CRITICAL, "RDMA ports", shown, _SAME, "ports/N/link_layer",
            "InfiniBand and Ethernet ports cannot reach each other", "devices under [transfer] that are of one kind",
        )  # fmt: skip
    ethernet = {node: [p for p in found if p.link_layer == "Ethernet"] for node, found in ports.items()}
    indices = {node: ",".join(sorted({str(p.gid_index) for p in found})) for node, found in ethernet.items() if found}
    if shown := _differing(indices):
        yield Finding(
            "nodes.gid_index", Severity.WARNING, "RoCE v2 GID", shown, _SAME, "ports/N/gids",
            "MC_GID_INDEX and the like fit some nodes only", "set it by node, or leave it out",
        )  # fmt: skip


def _differing(values: Mapping[str, Value]) -> str:
    """Which nodes have which value, most first; "" if all have the same."""
    nodes: dict[Value, list[str]] = defaultdict(list)
    for node, value in values.items():
        nodes[value].append(node)
    ordered = sorted(nodes.items(), key=lambda item: -len(item[1]))
    return "; ".join(f"{', '.join(names)}: {value}" for value, names in ordered) if len(nodes) > 1 else ""


def _rdma_port(port: Port, sysfs_root: Path) -> RdmaPort:
    good = [gid for gid in port.gids if "v2" in gid.kind and gid.ipv4]
    netdev = next((gid.netdev for gid in port.gids if gid.netdev), "")
    return RdmaPort(
        link_layer=port.link_layer,
        mtu=_mtu(sysfs_root, netdev),
        gid_index=min((gid.index for gid in good), default=None),
    )


def _mtu(sysfs_root: Path, interface: str) -> int:
    text = _line(sysfs_root / "class/net" / interface / "mtu") if interface else ""
    return int(text) if text.isdecimal() else 0


def _line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


CHECKS: tuple[Callable[[Traits], Iterator[Finding]], ...] = (versions, drivers, mtu, fabric)
