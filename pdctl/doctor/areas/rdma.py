"""Checks of RDMA devices and their ports. Each check is a function of the snapshot, listed in `CHECKS`.

Each check gives its threshold and source; docs/doctor.md has the table. Devices that the topology does not use are not
checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pdctl.doctor import Finding, Severity
from pdctl.host.devices.rdma import Device, Port, RdmaTree, Support, roce_mtu
from pdctl.host.devices.sysfs import Reader
from pdctl.topology.spec import Expect

# Environment variables that set a GID index for transfer libraries.
_GID_INDEX = ("MC_GID_INDEX", "NCCL_IB_GID_INDEX", "UCX_IB_GID_INDEX", "NVSHMEM_IB_GID_INDEX")
# IBTA: a bit error rate of 1e-12 is 120 symbol errors per hour on a 4X link. These are lifetime totals: any is
# reported.
_NARROW = {"symbol_error": 65535, "link_downed": 255, "link_error_recovery": 255,
           "local_link_integrity_errors": 15, "excessive_buffer_overrun_errors": 15}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the topology uses. `devices`: names, or empty for all devices; `is_required`: RDMA is required; `expect`:
    the expected properties of ports."""

    devices: tuple[str, ...] = ()
    is_required: bool = False
    expect: Expect = field(default_factory=Expect)


@dataclass(frozen=True, slots=True)
class RdmaFacts:
    """Facts for RDMA checks. `env`: the engines' environment; `sysfs_root`: for netdevs; `has_nodes`: the tree is this
    machine's, so /dev belongs to it."""

    tree: RdmaTree
    wanted: Wanted
    env: dict[str, str]
    sysfs_root: Path
    reader: Reader
    has_nodes: bool = True

    def judged(self) -> Iterator[Device]:
        """Devices that the topology uses."""
        for device in self.tree.devices:
            if not self.wanted.devices or device.name in self.wanted.devices:
                yield device

    def ports(self) -> Iterator[Port]:
        """The ports of these devices."""
        for device in self.judged():
            yield from device.ports


Check = Callable[[RdmaFacts], Iterator[Finding]]


def check(facts: RdmaFacts) -> list[Finding]:
    """Run all checks."""
    found = [finding for one in CHECKS for finding in one(facts)]
    if not facts.tree.devices:
        return found
    good = [port.subject for port in facts.ports() if not any(f.subject == port.subject for f in found)]
    return found + [Finding("port.state", Severity.OK, subject, _told(facts, subject)) for subject in good]


def _told(facts: RdmaFacts, subject: str) -> str:
    port = next(port for port in facts.ports() if port.subject == subject)
    return f"{port.state}, {port.phys_state}, {port.raw['rate'].text}, {port.link_layer}"


# -- presence ----------------------------------------------------------------------------------------------


def present(facts: RdmaFacts) -> Iterator[Finding]:
    """Whether there are RDMA devices. Their absence is a problem only if the topology requires RDMA."""
    up = [device.name for device in facts.tree.devices if any(port.state == "ACTIVE" for port in device.ports)]
    missing = [name for name in facts.wanted.devices if name not in {device.name for device in facts.tree.devices}]
    for name in missing:
        yield Finding(
            "port.gone", Severity.CRITICAL, name, "no such RDMA device", "the topology names it",
            "/sys/class/infiniband", "the name is misspelt, udev renamed the device, or it fell off the bus",
            f'devices = ["{up[0]}"] under [transfer]; or find it: lspci -d 15b3:; dmesg | grep mlx5'
            if up
            else "find it: lspci -d 15b3:; dmesg | grep mlx5",
        )  # fmt: skip
    if facts.tree.support is Support.DEVICES:
        return
    severity = Severity.CRITICAL if facts.wanted.is_required else Severity.INFO
    why = {
        Support.NO_MODULE: (
            "no RDMA modules are loaded in this kernel",
            'protocol = "tcp" under [transfer]; or modprobe ib_core mlx5_ib (for a container: on its host)',
        ),
        Support.NO_DEVICE: (
            "RDMA modules are loaded, but there is no device",
            'protocol = "tcp" under [transfer]; or check whether the card exists: lspci -d 15b3:',
        ),
    }  # fmt: skip
    observed, fix = why[facts.tree.support]
    wish = "a device: the topology requires RDMA" if facts.wanted.is_required else "not needed on one machine"
    yield Finding("rdma.none", severity, "rdma", observed, wish, "/sys/class/infiniband", "",
                  fix if facts.wanted.is_required else "")  # fmt: skip


def vanished(facts: RdmaFacts) -> Iterator[Finding]:
    """Names in the class directory without a device."""
    for name in facts.tree.vanished:
        yield Finding(
            "port.gone", Severity.WARNING, name, "no ports folder in sysfs", "a device",
            f"/sys/class/infiniband/{name}",
            "the device is being removed or its driver failed", "dmesg | tail; reload the driver",
        )  # fmt: skip


def char_devices(facts: RdmaFacts) -> Iterator[Finding]:
    """Character devices: libibverbs silently skips a device without one (NVSentinel has the same check)."""
    for device in facts.judged():
        node = device.char_device
        # Another machine's tree lists nodes, but whether they can be opened is unknown.
        if node and (not facts.has_nodes or os.access(node, os.R_OK | os.W_OK)):
            continue
        observed = f"{node} is missing" if node and not Path(node).exists() else f"{node} cannot be opened for writing"
        yield Finding(
            "port.chardev", Severity.CRITICAL, device.name,
            observed if node else "the kernel created no uverbs node for it",
            "/dev/infiniband/uverbsN, readable and writable", "/sys/class/infiniband_verbs",
            "the container lacks the device, or a module is missing: libibverbs will not list this device",
            "in a container: --device=/dev/infiniband --cap-add=IPC_LOCK; else: modprobe ib_uverbs rdma_ucm",
        )  # fmt: skip


# -- ports -------------------------------------------------------------------------------------------------

_STATE_FIXES = {
    "Polling": "the other end does not respond: check the cable, transceiver and switch port",
    "Disabled": "ip link set NETDEV up, or enable the port: mlxlink -d DEVICE --port_state UP",
    "Sleep": "the port is in sleep state: reseat the cable, reset the port",
}


def state(facts: RdmaFacts) -> Iterator[Finding]:
    """Port state: it should be ACTIVE and LinkUp. INIT and ARMED wait for a subnet manager."""
    for port in facts.ports():
        evidence = port.raw["state"].path
        if not port.raw["state"].is_ok:
            observed = f"the state cannot be read: {port.raw['state'].answer}"
            yield Finding("port.state", Severity.UNKNOWN, port.subject, observed, "4: ACTIVE", evidence)
        elif port.state == "ACTIVE":
            continue
        elif port.state in ("INIT", "ARMED"):
            yield Finding(
                "port.state", Severity.WARNING, port.subject, f"{port.state}, {port.phys_state}", "ACTIVE", evidence,
                "the link is up, but no subnet manager has configured it",
                "start opensm, or check the switch's subnet manager",
            )  # fmt: skip
        else:
            fix = _STATE_FIXES.get(port.phys_state, "check the cable, transceiver and switch port; dmesg | grep mlx5")
            mine = next(device for device in facts.tree.devices if device.name == port.device)
            is_used = bool(facts.wanted.devices or facts.wanted.is_required)
            # One active port per card is enough for an engine.
            is_alone = not any(other.state == "ACTIVE" for other in mine.ports)
            severity = Severity.CRITICAL if is_used and is_alone else Severity.WARNING
            yield Finding("port.state", severity, port.subject, f"{port.state}, {port.phys_state}", "ACTIVE, LinkUp",
                          evidence, "the port is down", fix)  # fmt: skip


def lids(facts: RdmaFacts) -> Iterator[Finding]:
    """Active InfiniBand ports without an address (LID)."""
    for port in facts.ports():
        if port.link_layer != "InfiniBand" or port.state != "ACTIVE":
            continue
        if port.lid() in (0, 0xFFFF) or port.lid("sm_lid") == 0:
            yield Finding(
                "port.lid", Severity.CRITICAL, port.subject,
                f"lid {port.raw['lid'].text}, sm_lid {port.raw['sm_lid'].text}", "both set by a subnet manager",
                port.raw["lid"].path, "no subnet manager serves this port", "start opensm; check partitions",
            )  # fmt: skip


def rates(facts: RdmaFacts) -> Iterator[Finding]:
    """Ports slower than others of their kind (NVSentinel's homogeneity check). Down ports may show any rate."""
    active = [(port, port.rate) for port in facts.ports() if port.state == "ACTIVE"]
    known = [(port, rate.gbps) for port, rate in active if rate is not None]
    # Compare within a board type: a management card is slower and has another board.
    board = {device.name: device.raw["board_id"].text for device in facts.tree.devices}
    kind = {port.subject: (port.link_layer, board[port.device]) for port in facts.ports()}
    for port, rate in active:
        if rate is None:
            yield Finding("port.rate", Severity.UNKNOWN, port.subject,
                          f"the rate cannot be parsed: {port.raw['rate'].text!r}",
                          "such as 400 Gb/sec (4X NDR)", port.raw["rate"].path)  # fmt: skip
            continue
        asked = facts.wanted.expect.rate_gbps
        if asked > 0 and rate.gbps < asked:
            yield Finding(
                "port.rate", Severity.CRITICAL, port.subject, f"{rate.gbps:g} Gb/s",
                f"{asked:g} Gb/s, from the topology", port.raw["rate"].path,
                "cable, a forced speed, or a breakout of the switch port",
                f"mlxlink -d {port.device}; or rate_gbps = {rate.gbps:g} under [expect]",
            )  # fmt: skip
            continue
        peers = sorted(gbps for other, gbps in known if kind[other.subject] == kind[port.subject])
        usual = peers[len(peers) // 2]
        if rate.gbps < usual:
            yield Finding(
                "port.rate", Severity.CRITICAL, port.subject, f"{rate.gbps:g} Gb/s", f"{usual:g} Gb/s, like its peers",
                port.raw["rate"].path, "cable, a forced speed, or a breakout of the switch port",
                "mlxlink -d DEVICE; compare cable and switch port with a peer's",
            )  # fmt: skip


def counters(facts: RdmaFacts) -> Iterator[Finding]:
    """Lifetime totals of narrow error counters. A saturated one no longer counts."""
    for port in facts.ports():
        for name, most in _NARROW.items():
            count = port.counters.get(name, 0)
            if not count:
                continue
            full = count >= most
            yield Finding(
                "err.counters", Severity.WARNING if full else Severity.INFO, port.subject,
                f"{name} = {count}{', its maximum' if full else ' since the driver was loaded'}",
                "0", f"counters/{name}", "errors on the link, recent or old",
                f"check whether it grows: pdctl doctor rdma --watch{'; reset: perfquery -R' if full else ''}",
            )  # fmt: skip


def link_layers(facts: RdmaFacts) -> Iterator[Finding]:
    """Ports with another link layer than the topology expects."""
    asked = facts.wanted.expect.link_layer
    for port in facts.ports() if asked != "any" else ():
        if port.link_layer.lower() != asked:
            yield Finding(
                "port.link_layer", Severity.CRITICAL, port.subject, port.link_layer or "unknown", asked,
                port.raw["link_layer"].path, "the card is configured for another link layer, or it is another card",
                f"mlxconfig -d {port.device} set LINK_TYPE_P1={1 if asked == 'infiniband' else 2}, then reboot",
            )  # fmt: skip


# -- RoCE --------------------------------------------------------------------------------------------------


def gids(facts: RdmaFacts) -> Iterator[Finding]:
    """RoCE ports without a RoCE v2 GID with a routable address."""
    for port in _roce(facts):
        if not any("v2" in gid.kind and not gid.gid.startswith("fe80:") for gid in port.gids):
            yield Finding(
                "roce.gid", Severity.CRITICAL, port.subject,
                f"{len(port.gids)} GIDs, none of them RoCE v2 with an address",
                "one with an IPv4-mapped or global address", f"{port.subject} gids/*, gid_attrs/types/*",
                "its netdev has no IP address: connections fail with `Failed to modify QP to RTR`",
                "ip addr add ADDRESS/PREFIX dev NETDEV",
            )  # fmt: skip


def gid_index(facts: RdmaFacts) -> Iterator[Finding]:
    """Configured GID indices that point at an empty or v1 slot."""
    # Only numbers: with -1 and `auto` the library chooses.
    given_by = {name: facts.env[name] for name in _GID_INDEX if facts.env.get(name, "").isdecimal()}
    if facts.wanted.expect.gid_index >= 0:
        given_by["[expect] gid_index"] = str(facts.wanted.expect.gid_index)
    for name, given in given_by.items():
        for port in _roce(facts):
            found = next((gid for gid in port.gids if str(gid.index) == given), None)
            good = [str(gid.index) for gid in port.gids if "v2" in gid.kind and gid.ipv4]
            if found is None or "v2" not in found.kind:
                observed = "an empty slot" if found is None else f"a {found.kind} GID"
                yield Finding(
                    "roce.gid_index", Severity.CRITICAL, port.subject, f"{name}={given} points at {observed}",
                    f"a RoCE v2 GID: {', '.join(good) or 'there is none'}", f"environment, {port.subject} gids/{given}",
                    "queue pairs are created with an invalid address",
                    _index_fix(name, good),
                )  # fmt: skip


def _index_fix(name: str, good: list[str]) -> str:
    if not good:
        return "ip addr add ADDRESS/PREFIX dev NETDEV"
    return f"gid_index = {good[0]} under [expect]" if name.startswith("[") else f"export {name}={good[0]}"


def mtu(facts: RdmaFacts) -> Iterator[Finding]:
    """The RDMA MTU follows the netdev's. Below 4096, each message takes more packets."""
    for port in _roce(facts):
        for netdev in sorted({gid.netdev for gid in port.gids if gid.netdev}):
            value = facts.reader.read(facts.sysfs_root / "class/net" / netdev / "mtu").integer()
            if value is None:
                continue
            derived = roce_mtu(value)
            asked = facts.env.get("MC_MTU", "")
            if asked.isdecimal() and int(asked) > derived:
                yield Finding(
                    "roce.mtu", Severity.CRITICAL, port.subject, f"MC_MTU={asked}, but {netdev} allows {derived}",
                    f"at most {derived}", f"/sys/class/net/{netdev}/mtu = {value}",
                    "connections fail with `Failed to modify QP to RTR, check mtu`",
                    f"export MC_MTU={derived}, or: ip link set {netdev} mtu 9000",
                )  # fmt: skip
            elif derived < (facts.wanted.expect.mtu or 4096):
                yield Finding(
                    "roce.mtu", Severity.WARNING, port.subject, f"RDMA MTU {derived} (from {netdev}'s {value})",
                    str(facts.wanted.expect.mtu or 4096),
                    f"/sys/class/net/{netdev}/mtu", "small packets lower the throughput",
                    f"ip link set {netdev} mtu 9000, and on the switch",
                )  # fmt: skip


def _roce(facts: RdmaFacts) -> Iterator[Port]:
    return (port for port in facts.ports() if port.link_layer == "Ethernet" and port.state == "ACTIVE")


# -- devices -----------------------------------------------------------------------------------------------


def firmware(facts: RdmaFacts) -> Iterator[Finding]:
    """Devices of the same board type with different firmware (gcm FIRMWARE_MISMATCH)."""
    boards: dict[str, dict[str, list[str]]] = {}
    for device in facts.judged():
        board = device.raw["board_id"].text
        if board and device.firmware:
            boards.setdefault(board, {}).setdefault(device.firmware, []).append(device.name)
    for board, versions in boards.items():
        if len(versions) > 1:
            shown = "; ".join(f"{version}: {', '.join(names)}" for version, names in sorted(versions.items()))
            yield Finding(
                "fw.mix", Severity.WARNING, board, shown, "one version", "fw_ver, board_id",
                "identical cards may behave differently", "install the same firmware on all: mlxfwmanager",
            )  # fmt: skip


def pci_link(facts: RdmaFacts) -> Iterator[Finding]:
    """Cards with fewer or slower PCIe lanes than they support. Virtual machines often report `Unknown`."""
    for device in facts.judged():
        for what, severity in (("width", Severity.CRITICAL), ("speed", Severity.WARNING)):
            now, most = (device.pci_raw[f"{which}_link_{what}"].text.split(" ")[0] for which in ("current", "max"))
            if now.replace(".", "").isdecimal() and most.replace(".", "").isdecimal() and 0 < float(now) < float(most):
                unit = "lanes" if what == "width" else "GT/s"
                yield Finding(
                    f"pcie.{what}", severity, device.name, f"{now} {unit}", f"{most} {unit}",
                    device.pci_raw[f"current_link_{what}"].path, "a slot, riser or BIOS setting below the card's best",
                    "reseat it; check the slot and the BIOS; lspci -vv shows LnkSta and LnkCap",
                )  # fmt: skip


CHECKS: tuple[Check, ...] = (
    present, vanished, char_devices, state, lids, rates, link_layers, counters, gids, gid_index, mtu, firmware,
    pci_link,
)  # fmt: skip
