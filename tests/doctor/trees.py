"""Fake sysfs trees with RDMA devices, laid out as in the kernel, including class links."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict, Unpack

ZERO_GID = ":".join(["0000"] * 8)
COUNTERS = ("symbol_error", "link_downed", "link_error_recovery", "port_rcv_errors", "port_xmit_discards",
            "local_link_integrity_errors", "excessive_buffer_overrun_errors", "port_xmit_data")  # fmt: skip


@dataclass
class Port:
    """Files of a port; None for a missing one. `gids`: (gid, type, netdev)."""

    state: str | None = "4: ACTIVE"
    phys_state: str | None = "5: LinkUp"
    rate: str | None = "400 Gb/sec (4X NDR)"
    link_layer: str | None = "InfiniBand"
    lid: str | None = "0x2d"
    sm_lid: str | None = "0x1"
    gids: list[tuple[str, str, str]] = field(
        default_factory=lambda: [("fe80:0000:0000:0000:a088:c203:0024:c926", "IB/RoCE v1", "")]
    )
    counters: dict[str, str] = field(default_factory=dict)
    hw_counters: dict[str, str] = field(default_factory=dict)


class PortFiles(TypedDict, total=False):
    """Of a Port, where a test wants others."""

    state: str | None
    phys_state: str | None
    rate: str | None
    link_layer: str | None
    lid: str | None
    sm_lid: str | None
    gids: list[tuple[str, str, str]]
    counters: dict[str, str]
    hw_counters: dict[str, str]


def roce(**more: Unpack[PortFiles]) -> Port:
    """An Ethernet port with the usual four GIDs."""
    link, ip = "fe80:0000:0000:0000:0ac0:ebff:fe3d:ca54", "0000:0000:0000:0000:0000:ffff:0a6e:0021"
    gids = [
        (link, "IB/RoCE v1", "eth1"),
        (link, "RoCE v2", "eth1"),
        (ip, "IB/RoCE v1", "eth1"),
        (ip, "RoCE v2", "eth1"),
    ]
    values: PortFiles = {
        "rate": "100 Gb/sec (4X EDR)", "link_layer": "Ethernet", "lid": "0x0", "sm_lid": "0x0", "gids": gids, **more,
    }  # fmt: skip
    return Port(**values)


class PciAttributes(TypedDict, total=False):
    """Files of a PCI function that a test sets."""

    vendor: str
    class_: str
    current_link_width: str
    max_link_width: str


class HcaAttributes(TypedDict, total=False):
    """Files of an RDMA device that a test sets."""

    node_type: str
    fw_ver: str
    hw_rev: str
    board_id: str


class Tree:
    """A fake /sys below `root`."""

    def __init__(self, root: Path, has_class: bool = True) -> None:
        self.root = root
        self._uverbs = 0
        (root / "bus/pci/devices").mkdir(parents=True)
        (root / "module").mkdir()
        if has_class:
            for name in ("infiniband", "infiniband_verbs", "infiniband_mad", "net"):
                (root / "class" / name).mkdir(parents=True)
            self.write("class/infiniband_verbs/abi_version", "6\n")

    def write(self, path: str, text: str | bytes) -> Path:
        """Create a file and its parent folders."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text if isinstance(text, bytes) else text.encode())
        return target

    def link(self, target: Path, path: str) -> None:
        """Create a relative link, as the kernel does."""
        source = self.root / path
        source.parent.mkdir(parents=True, exist_ok=True)
        source.symlink_to(os.path.relpath(target, source.parent))

    def pci(self, path: str, node: int = 0, **attributes: Unpack[PciAttributes]) -> Path:
        """A PCI function at `path` below devices, such as pci0000:00/0000:00:01.0/0000:01:00.0."""
        folder = self.root / "devices" / path
        folder.mkdir(parents=True, exist_ok=True)
        values = {
            "numa_node": str(node), "vendor": "0x15b3", "device": "0x1021", "class": "0x020700",
            "current_link_speed": "32.0 GT/s PCIe", "max_link_speed": "32.0 GT/s PCIe", "current_link_width": "16",
            "max_link_width": "16", "subsystem_vendor": "0x15b3", "subsystem_device": "0x0041",
            **{name: str(value) for name, value in attributes.items()},
        }  # fmt: skip
        for name, value in values.items():
            (folder / name).write_text(f"{value}\n")
        numbers = (int(values[name], 16) for name in ("vendor", "device", "subsystem_vendor", "subsystem_device"))
        vendor, device, *card = numbers
        alias = f"pci:v{vendor:08X}d{device:08X}sv{card[0]:08X}sd{card[1]:08X}bc02sc07i00"
        (folder / "modalias").write_text(f"{alias}\n")
        self.link(folder, f"bus/pci/devices/{folder.name}")
        return folder

    def hca(
        self, name: str, ports: dict[int, Port], bus: int = 1, node: int = 0, **attributes: Unpack[HcaAttributes]
    ) -> Path:
        """An RDMA device on its own PCI function."""
        pci = self.pci(f"pci0000:{bus:02x}/0000:{bus:02x}:01.0/0000:{bus + 1:02x}:00.0", node)
        folder = pci / "infiniband" / name
        values = {
            "node_type": "1: CA", "node_guid": "a088:c203:0024:c926", "sys_image_guid": "a088:c203:0024:c926",
            "fw_ver": "28.39.2048", "hca_type": "MT4129", "hw_rev": "0", "board_id": "MT_0000000838",
            "node_desc": f"node1 {name}", **attributes,
        }  # fmt: skip
        folder.mkdir(parents=True)
        for file, value in values.items():
            if value:
                (folder / file).write_text(f"{value}\n")
        (folder / "device").symlink_to("../..")
        self.link(folder, f"class/infiniband/{name}")
        verbs = pci / "infiniband_verbs" / f"uverbs{self._uverbs}"
        verbs.mkdir(parents=True)
        (verbs / "ibdev").write_text(f"{name}\n")
        (verbs / "dev").write_text(f"231:{192 + self._uverbs}\n")
        (verbs / "abi_version").write_text("1\n")
        (verbs / "device").symlink_to("../..")
        self.link(verbs, f"class/infiniband_verbs/{verbs.name}")
        self._uverbs += 1
        for number, port in ports.items():
            self.port(folder, number, port)
        return folder

    def port(self, device: Path, number: int, port: Port) -> None:
        """One port of a device."""
        folder = device / "ports" / str(number)
        folder.mkdir(parents=True)
        for name in ("state", "phys_state", "rate", "link_layer", "lid", "sm_lid"):
            value = getattr(port, name)
            if value is not None:
                (folder / name).write_text(f"{value}\n")
        for index, (gid, kind, netdev) in enumerate(port.gids):
            for file, value in (("gids", gid), ("gid_attrs/types", kind), ("gid_attrs/ndevs", netdev)):
                if value:
                    (folder / file).mkdir(parents=True, exist_ok=True)
                    (folder / file / str(index)).write_text(f"{value}\n")
        for name in COUNTERS:
            (folder / "counters").mkdir(exist_ok=True)
            (folder / "counters" / name).write_text(f"{port.counters.get(name, 0)}\n")
        for name, count in port.hw_counters.items():
            (folder / "hw_counters").mkdir(exist_ok=True)
            (folder / "hw_counters" / name).write_text(f"{count}\n")

    def netdev(self, name: str, device: Path, **attributes: str) -> None:
        """The Ethernet side of a RoCE port."""
        folder = device.parent.parent / "net" / name
        folder.mkdir(parents=True)
        values = {
            "mtu": "9000",
            "operstate": "up",
            "carrier": "1",
            "carrier_changes": "2",
            "dev_port": "0",
            **attributes,
        }
        for file, value in values.items():
            (folder / file).write_text(f"{value}\n")
        self.link(folder, f"class/net/{name}")


Make = Callable[[Path], Tree]


def _many(count: int) -> Make:
    def make(root: Path) -> Tree:
        tree = Tree(root)
        for number in range(count):
            tree.hca(f"mlx5_{number}", {1: Port(lid=hex(number + 1))}, bus=2 * number + 1)
        return tree

    return make


def _one(name: str = "mlx5_0", ports: dict[int, Port] | None = None, **attributes: Unpack[HcaAttributes]) -> Make:
    def make(root: Path) -> Tree:
        tree = Tree(root)
        tree.hca(name, {1: Port()} if ports is None else ports, **attributes)
        return tree

    return make


def _no_class(root: Path) -> Tree:
    return Tree(root, has_class=False)


def _no_ports_folder(root: Path) -> Tree:
    tree = Tree(root)
    tree.hca("mlx5_0", {1: Port()})
    tree.hca("bare0", {}, bus=7)
    return tree


def _file_where_a_folder_should_be(root: Path) -> Tree:
    tree = _one()(root)
    tree.write("class/infiniband/oddity", "x\n")
    return tree


def _dangling(root: Path) -> Tree:
    tree = _one()(root)
    (root / "class/infiniband/gone0").symlink_to("../../devices/nowhere")
    return tree


def _gid_is_a_folder(root: Path) -> Tree:
    tree = _one(ports={1: Port(gids=[])})(root)
    (tree.root / "class/infiniband/mlx5_0/ports/1/gids/0").mkdir(parents=True)
    return tree


def _raw(name: str, text: bytes) -> Make:
    def make(root: Path) -> Tree:
        tree = _one()(root)
        (root / "class/infiniband/mlx5_0/ports/1" / name).write_bytes(text)
        return tree

    return make


def _odd_port_names(root: Path) -> Tree:
    tree = _one()(root)
    folder = root / "class/infiniband/mlx5_0"
    tree.port(folder, 10, Port(lid="0xa"))
    tree.port(folder, 2, Port(lid="0x2"))
    (folder / "ports/.hidden").mkdir()
    (folder / "ports/x").mkdir()
    return tree


EFA = Port(link_layer="Unspecified", rate="100 Gb/sec (4X EDR)", lid="0x0", sm_lid="0x0")
INIT = Port(state="2: INIT", rate="2.5 Gb/sec (1X)", lid="0xffff", sm_lid="0x0")
DOWN = Port(state="1: DOWN", phys_state="3: Disabled", rate="40 Gb/sec (4X QDR)")
TREES: dict[str, Make] = {
    "infiniband": _one(),
    "roce": _one("rocep5s0f0", {1: roce()}),
    "roce down": _one("mlx5_1", {1: roce(state="1: DOWN", phys_state="3: Disabled", rate="40 Gb/sec (4X QDR)")}),
    "efa": _one("rdmap16s27", {1: EFA}, node_type="7: unspecified"),
    "iwarp": _one("iwp0", {1: roce(gids=[("0200:0000:0000:0000:0000:0000:0000:0000", "", "")])}, node_type="4: RNIC"),
    "dual port": _one("mlx5_bond_0", {1: Port(), 2: INIT}),
    "vf": _one("mlx5_17", {1: Port(gids=[(ZERO_GID, "", "")])}),
    "bonded": _one("mlx5_bond_0", {1: roce()}),
    "switch": _one("mlx5_sw", {0: Port(), 1: Port(), 36: DOWN}, node_type="2: switch"),
    "empty": Tree,
    "no class": _no_class,
    "broken": _one(ports={1: Port(rate=None, link_layer=None, sm_lid=None, gids=[])}),
    "nothing in the port": _one(ports={1: Port(None, None, None, None, None, None, [])}),
    "old rate": _one(ports={1: Port(rate="10 Gb/sec (4X)")}),
    "older rate": _one(ports={1: Port(rate="2.5 Gb/sec (1X)", link_layer=None)}),
    "xdr": _one(ports={1: Port(rate="800 Gb/sec (4X XDR)")}),
    "fdr10": _one(ports={1: Port(rate="40 Gb/sec (4X FDR10)")}),
    "half rate": _one(ports={1: Port(rate="12.5 Gb/sec (1X EDR)")}),
    "armed": _one(ports={1: Port(state="3: ARMED", phys_state="4: PortConfigurationTraining")}),
    "polling": _one(ports={1: Port(state="1: DOWN", phys_state="2: Polling")}),
    "deferred": _one(ports={1: Port(state="5: ACTIVE_DEFER", phys_state="6: LinkErrorRecovery")}),
    "phy test": _one(ports={1: Port(state="0: NOP", phys_state="7: Phy Test")}),
    "unknown numbers": _one(ports={1: Port(state="9: UNKNOWN", phys_state="12: <unknown>")}),
    "twelve devices": _many(12),
    "two devices": _many(2),
    "dashes and dots": _one("ib-p26.s0_x"),
    "capital": _one("MLX5_0"),
    "digits": _one("0"),
    "long name": _one("m" * 63),
    "underscores": _one("mlx5_ib0"),
    "no ports folder": _no_ports_folder,
    "a file in the class": _file_where_a_folder_should_be,
    "dangling link": _dangling,
    "gid is a folder": _gid_is_a_folder,
    "odd port names": _odd_port_names,
    "no newline": _raw("state", b"4: ACTIVE"),
    "empty file": _raw("rate", b""),
    "only blanks": _raw("rate", b"  \t \n"),
    "inner blanks": _raw("rate", b"  400   Gb/sec\t(4X  NDR) \n\n"),
    "two lines": _raw("state", b"4: ACTIVE\nmore\n"),
    "not ascii": _raw("phys_state", "5: LinkUp\u00e9\n".encode("latin-1")),
    "nul": _raw("lid", b"0x\x002d\n"),
    "a pattern": _raw("rate", b"400 * (4X ?DR) [m]*\n"),
    "backslashes": _raw("state", b"4: \\tACTIVE\\\\ \\101 \\0101\n"),
    "an escape": _raw("rate", b"4 \\e[1m \\E \\x41 \\q\n"),
    "cut short": _raw("state", b"4: ACT\\cIVE\n"),
    "very long": _raw("rate", b"x" * 9000 + b"\n"),
}  # fmt: skip
