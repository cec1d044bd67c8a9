"""RDMA devices from sysfs: one snapshot with parsed values and raw text, without any judgement.

It reads only below `sysfs_root` and `dev_root`. Fields, formats and pitfalls: the kernel's
Documentation/ABI/stable/sysfs-class-infiniband and drivers/infiniband/core/sysfs.c.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv6Address
from pathlib import Path

from pdctl.host.devices.sysfs import Answer, Reader, Value

_ZERO_GID = ":".join(["0000"] * 8)
_RATE = re.compile(r"(?P<gbps>\d+(?:\.\d+)?) Gb/sec(?: \((?P<lanes>\d+)X(?: (?P<speed>\w+))?\))?")
_DIGITS = re.compile(r"(\d+)")


class Support(StrEnum):
    """Whether there are devices, or why not."""

    DEVICES = "devices"
    NO_DEVICE = "modules are loaded, but there is no device"
    NO_MODULE = "the kernel's RDMA modules are not loaded"


@dataclass(frozen=True, slots=True)
class RdmaDevice:
    """The facts of a device that a plan needs. `pci`: its address, "" if it is not a PCI function; `is_active`: a port
    is up; `has_node`: programs can open it (a container may see a device in /sys without having access to it)."""

    name: str
    pci: str
    is_active: bool
    has_node: bool = True


@dataclass(frozen=True, slots=True)
class Gid:
    """One non-empty entry of a port's GID table. `ipv4`: the mapped address, or ""."""

    index: int
    gid: str
    kind: str
    netdev: str
    ipv4: str


@dataclass(frozen=True, slots=True)
class Rate:
    """A port's rate. `speed`: "" if the kernel is too old to name it."""

    gbps: float
    lanes: int
    speed: str


@dataclass(frozen=True, slots=True)
class Port:
    """One port. `raw`: every file that was read, by name; `counters` and `hw_counters`: those with numeric values."""

    device: str
    number: int
    raw: dict[str, Value] = field(hash=False)
    gids: tuple[Gid, ...] = ()
    counters: dict[str, int] = field(default_factory=dict, hash=False)
    hw_counters: dict[str, int] = field(default_factory=dict, hash=False)

    @property
    def subject(self) -> str:
        """The port's name, such as mlx5_0:1."""
        return f"{self.device}:{self.number}"

    @property
    def state(self) -> str:
        """ACTIVE, DOWN, INIT and so on; "" if it cannot be read."""
        return self.raw["state"].text.partition(":")[2].strip()

    @property
    def phys_state(self) -> str:
        """LinkUp, Polling, Disabled and so on."""
        return self.raw["phys_state"].text.partition(":")[2].strip()

    @property
    def link_layer(self) -> str:
        """The link layer; InfiniBand if an old kernel lacks the file, as the standard tools assume."""
        found = self.raw["link_layer"]
        return "InfiniBand" if found.answer is Answer.MISSING else found.text.strip()

    @property
    def rate(self) -> Rate | None:
        """The rate; None if it is missing or malformed."""
        found = _RATE.fullmatch(self.raw["rate"].text.strip())
        if found is None:
            return None
        return Rate(float(found["gbps"]), int(found["lanes"] or 0), found["speed"] or "")

    def lid(self, name: str = "lid") -> int | None:
        """A local identifier; None if it cannot be read."""
        return self.raw[name].integer(16)


@dataclass(frozen=True, slots=True)
class Device:
    """One device. `char_device`: /dev/infiniband/uverbsN, "" if the kernel created none; `numa_node`: -1 if unknown."""

    name: str
    raw: dict[str, Value] = field(hash=False)
    pci: str = ""
    pci_raw: dict[str, Value] = field(default_factory=dict, hash=False)
    numa_node: int = -1
    is_virtual: bool = False
    char_device: str = ""
    netdevs: tuple[str, ...] = ()
    ports: tuple[Port, ...] = ()

    @property
    def firmware(self) -> str:
        """The firmware version, such as 28.39.2048."""
        return self.raw["fw_ver"].text.strip()


@dataclass(frozen=True, slots=True)
class RdmaTree:
    """All devices. `vanished`: names without a device, such as one that is being removed."""

    support: Support
    devices: tuple[Device, ...] = ()
    vanished: tuple[str, ...] = ()


_DEVICE_FILES = ("node_type", "node_guid", "sys_image_guid", "fw_ver", "hca_type", "hw_rev", "board_id", "node_desc")
_PORT_FILES = ("state", "phys_state", "rate", "link_layer", "lid", "sm_lid", "lid_mask_count", "sm_sl", "cap_mask")
_PCI_FILES = ("vendor", "device", "current_link_speed", "max_link_speed", "current_link_width", "max_link_width",
              "numa_node", "local_cpulist")  # fmt: skip


def read_tree(sysfs_root: Path = Path("/sys"), dev_root: Path = Path("/dev"), reader: Reader | None = None) -> RdmaTree:
    """Read all devices, in natural order: mlx5_2 before mlx5_10."""
    folder, reader = sysfs_root / "class/infiniband", reader or Reader()
    if not folder.is_dir():
        return RdmaTree(Support.NO_MODULE)
    devices, vanished = [], []
    verbs = _char_devices(sysfs_root, dev_root, reader)
    for name in sorted(_listed(folder), key=natural):
        if (folder / name / "ports").is_dir():
            devices.append(_device(folder / name, name, verbs.get(name, ""), reader))
        else:
            vanished.append(name)
    return RdmaTree(Support.DEVICES if devices else Support.NO_DEVICE, tuple(devices), tuple(vanished))


def read_rdma(sysfs_root: Path = Path("/sys"), dev_root: Path = Path("/dev")) -> tuple[RdmaDevice, ...]:
    """All devices in order of name, with the facts that a plan needs; empty without RDMA."""
    folder, reader = sysfs_root / "class/infiniband", Reader()
    nodes = _char_devices(sysfs_root, dev_root, reader)

    def device(name: str) -> RdmaDevice:
        node = nodes.get(name, "")
        has_node = not node or os.access(node, os.R_OK | os.W_OK)
        return RdmaDevice(name, _address(folder / name), _is_up(folder / name, reader), has_node)

    return tuple(map(device, sorted(_listed(folder))))


def active_devices(sysfs_root: Path = Path("/sys")) -> list[str]:
    """Names of the devices with an ACTIVE port, in order."""
    return [device.name for device in read_rdma(sysfs_root) if device.is_active]


def natural(name: str) -> list[tuple[int, int | str]]:
    """A sort key for natural order: mlx5_2 before mlx5_10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in _DIGITS.split(name) if part]


def roce_mtu(netdev_mtu: int) -> int:
    """The RDMA MTU of a RoCE port, from its netdev's MTU minus the largest headers (the kernel's iboe_get_mtu)."""
    # GRH 40, UDP 8, BTH 12, XRCETH 4, AtomicETH 28, ICRC 4: include/rdma/ib_addr.h.
    room = netdev_mtu - (40 + 8 + 12 + 4 + 28 + 4)
    return next((mtu for mtu in (4096, 2048, 1024, 512, 256) if mtu <= room), 0)


# -- parts -------------------------------------------------------------------------------------------------


def _device(folder: Path, name: str, char_device: str, reader: Reader) -> Device:
    function = folder / "device"
    ports = [int(number) for number in _listed(folder / "ports") if number.isdecimal()]
    node = reader.read(function / "numa_node").integer()
    return Device(
        name=name,
        raw={file: reader.read(folder / file) for file in _DEVICE_FILES},
        pci=_address(folder),
        pci_raw={file: reader.read(function / file) for file in _PCI_FILES},
        numa_node=-1 if node is None else node,
        is_virtual=(function / "physfn").exists(),
        char_device=char_device,
        netdevs=tuple(sorted(_listed(function / "net"), key=natural)),
        ports=tuple(_port(folder / "ports" / str(number), name, number, reader) for number in sorted(ports)),
    )


def _port(folder: Path, device: str, number: int, reader: Reader) -> Port:
    return Port(
        device=device,
        number=number,
        raw={file: reader.read(folder / file) for file in _PORT_FILES},
        gids=_gids(folder, reader),
        counters=_numbers(folder / "counters", reader),
        hw_counters=_numbers(folder / "hw_counters", reader),
    )


def _gids(folder: Path, reader: Reader) -> tuple[Gid, ...]:
    """Non-empty entries of the GID table. An empty one reads as zeros, and its type as EINVAL."""
    found = []
    for index in sorted(int(name) for name in _listed(folder / "gids") if name.isdecimal()):
        gid = reader.read(folder / "gids" / str(index)).text.strip()
        if not gid or gid == _ZERO_GID:
            continue
        kind = reader.read(folder / "gid_attrs/types" / str(index)).text.strip()
        netdev = reader.read(folder / "gid_attrs/ndevs" / str(index)).text.strip()
        found.append(Gid(index, gid, kind, netdev, _ipv4(gid)))
    return tuple(found)


def _ipv4(gid: str) -> str:
    try:
        mapped = IPv6Address(gid).ipv4_mapped
    except ValueError:
        return ""
    return str(mapped) if mapped else ""


def _numbers(folder: Path, reader: Reader) -> dict[str, int]:
    """Counters with numeric values: some contain "N/A (no PMA)"."""
    values = ((name, reader.read(folder / name).integer()) for name in sorted(_listed(folder)))
    return {name: value for name, value in values if value is not None}


def _char_devices(sysfs_root: Path, dev_root: Path, reader: Reader) -> dict[str, str]:
    """Device name to the path of its verbs node, which may not exist."""
    found = {}
    folder = sysfs_root / "class/infiniband_verbs"
    for name in _listed(folder):
        if name.startswith("uverbs"):
            device = reader.read(folder / name / "ibdev").text.strip()
            found[device] = str(dev_root / "infiniband" / name)
    return found


def _address(device: Path) -> str:
    try:
        name = (device / "device").resolve(strict=True).name
    except OSError:
        return ""
    return name if name.count(":") == 2 else ""


def _is_up(device: Path, reader: Reader) -> bool:
    ports = device / "ports"
    return any("ACTIVE" in reader.read(ports / number / "state").text for number in _listed(ports))


def _listed(folder: Path) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if not name.startswith(".")]  # noqa: PTH208 - only names are needed
    except OSError:
        return []
