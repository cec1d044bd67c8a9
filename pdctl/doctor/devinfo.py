"""The output of `ibv_devinfo` (rdma-core), from sysfs and, if installed, the verbs library.

The real tool gets everything but the board from the library. sysfs has no MTU and no IEEE vendor number: without the
library these are printed as not available.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pdctl.doctor.verbs import DeviceVerbs
from pdctl.errors import PdctlError
from pdctl.host.devices.rdma import Device, Port, RdmaTree

UNKNOWN = "n/a (needs libibverbs)"
_TRANSPORTS = {1: "InfiniBand (0)", 2: "InfiniBand (0)", 3: "InfiniBand (0)", 4: "iWARP (1)", 5: "usNIC (2)",
               6: "usNIC UDP (3)", 7: "unspecified (4)"}  # fmt: skip
_STATES = {1: "PORT_DOWN", 2: "PORT_INIT", 3: "PORT_ARMED", 4: "PORT_ACTIVE"}
_MTUS = {256: 1, 512: 2, 1024: 3, 2048: 4, 4096: 5}


def devinfo(tree: RdmaTree, verbs: dict[str, DeviceVerbs], wanted: Sequence[str] = ()) -> str:
    """All devices, or those given as DEVICE or DEVICE:PORT. Raises PdctlError for one that does not exist."""
    chosen = {word.partition(":")[0]: word.partition(":")[2] for word in wanted}
    known = [device.name for device in tree.devices]
    for name, number in chosen.items():
        device = next((device for device in tree.devices if device.name == name), None)
        if device is None:
            raise PdctlError(f"there is no RDMA device {name!r}", f"devices: {', '.join(known) or 'none'}")
        if number and number not in {str(port.number) for port in device.ports}:
            raise PdctlError(f"{name} has no port {number!r}", f"number of ports: {len(device.ports)}")
    parts = [
        "".join(_device(device, verbs.get(device.name), chosen.get(device.name, "")))
        for device in tree.devices
        if not chosen or device.name in chosen
    ]
    return "".join(parts) if parts else "No IB devices found\n"


def _device(device: Device, verbs: DeviceVerbs | None, only: str) -> Iterator[str]:
    raw = {name: value.text.strip() for name, value in device.raw.items()}
    kind = device.raw["node_type"].integer()
    part = device.pci_raw["device"].integer(16) if device.pci_raw else None
    revision = device.raw["hw_rev"].integer(16)
    yield f"hca_id:\t{device.name}\n"
    yield f"\ttransport:\t\t\t{_TRANSPORTS.get(kind or 0, 'invalid transport')}\n"
    if raw["fw_ver"]:
        yield f"\tfw_ver:\t\t\t\t{raw['fw_ver']}\n"
    yield f"\tnode_guid:\t\t\t{raw['node_guid'] or UNKNOWN}\n"
    yield f"\tsys_image_guid:\t\t\t{raw['sys_image_guid'] or UNKNOWN}\n"
    yield f"\tvendor_id:\t\t\t{f'0x{verbs.vendor_id:04x}' if verbs else UNKNOWN}\n"
    yield f"\tvendor_part_id:\t\t\t{verbs.vendor_part_id if verbs else UNKNOWN if part is None else part}\n"
    yield f"\thw_ver:\t\t\t\t{f'0x{verbs.hw_ver:X}' if verbs else UNKNOWN if revision is None else f'0x{revision:X}'}\n"
    if raw["board_id"]:
        yield f"\tboard_id:\t\t\t{raw['board_id']}\n"
    yield f"\tphys_port_cnt:\t\t\t{len(device.ports)}\n"
    for port in device.ports:
        if not only or only == str(port.number):
            yield from _port(port, verbs)


def _port(port: Port, verbs: DeviceVerbs | None) -> Iterator[str]:
    known = verbs.ports.get(port.number) if verbs else None
    state = port.raw["state"].integer()
    lids = {name: port.lid(name) for name in ("sm_lid", "lid", "lid_mask_count")}
    state_text = UNKNOWN if state is None else f"{_STATES.get(state, 'invalid state')} ({state})"
    shown = {name: UNKNOWN if value is None else str(value) for name, value in lids.items()}
    yield f"\t\tport:\t{port.number}\n"
    yield f"\t\t\tstate:\t\t\t{state_text}\n"
    yield f"\t\t\tmax_mtu:\t\t{_mtu(known.max_mtu) if known else UNKNOWN}\n"
    yield f"\t\t\tactive_mtu:\t\t{_mtu(known.active_mtu) if known else UNKNOWN}\n"
    yield f"\t\t\tsm_lid:\t\t\t{shown['sm_lid']}\n"
    yield f"\t\t\tport_lid:\t\t{shown['lid']}\n"
    yield f"\t\t\tport_lmc:\t\t0x{lids['lid_mask_count'] or 0:02x}\n"
    yield f"\t\t\tlink_layer:\t\t{_layer(port.link_layer)}\n\n"


def _mtu(size: int) -> str:
    return f"{size} ({_MTUS[size]})" if size in _MTUS else "invalid MTU"


def _layer(name: str) -> str:
    return name if name in ("InfiniBand", "Ethernet") else "Unspecified"
