"""Device attributes that only libibverbs knows, if it is installed and can open the device.

The structures are those of infiniband/verbs.h, ABI 1.1 (rdma-core), as far as they are read.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

_MTU = {1: 256, 2: 512, 3: 1024, 4: 2048, 5: 4096}


class _DeviceAttributes(ctypes.Structure):
    _fields_ = (
        ("fw_ver", ctypes.c_char * 64),
        ("node_guid", ctypes.c_uint64),
        ("sys_image_guid", ctypes.c_uint64),
        ("max_mr_size", ctypes.c_uint64),
        ("page_size_cap", ctypes.c_uint64),
        ("vendor_id", ctypes.c_uint32),
        ("vendor_part_id", ctypes.c_uint32),
        ("hw_ver", ctypes.c_uint32),
        ("rest", ctypes.c_char * 512),
    )


class _PortAttributes(ctypes.Structure):
    _fields_ = (
        ("state", ctypes.c_int),
        ("max_mtu", ctypes.c_int),
        ("active_mtu", ctypes.c_int),
        ("rest", ctypes.c_char * 256),
    )


@dataclass(frozen=True, slots=True)
class PortVerbs:
    """The MTUs of a port in bytes."""

    max_mtu: int
    active_mtu: int


@dataclass(frozen=True, slots=True)
class DeviceVerbs:
    """Attributes of a device. `vendor_id` is the IEEE number, not the PCI one."""

    vendor_id: int
    vendor_part_id: int
    hw_ver: int
    ports: dict[int, PortVerbs] = field(default_factory=dict, hash=False)


def read_verbs(ports: dict[str, list[int]]) -> dict[str, DeviceVerbs]:
    """Attributes of these devices and ports; empty if the library is missing or cannot open a device."""
    try:
        ctypes.CDLL("libibverbs.so.1", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return {}
    # Resolve symbols in the process itself, as in a linked program, so that a preloaded library comes first.
    library = ctypes.CDLL(None)
    library.ibv_get_device_list.restype = ctypes.POINTER(ctypes.c_void_p)
    library.ibv_get_device_name.restype = ctypes.c_char_p
    library.ibv_get_device_name.argtypes = (ctypes.c_void_p,)
    library.ibv_open_device.restype = ctypes.c_void_p
    library.ibv_open_device.argtypes = (ctypes.c_void_p,)
    for one in ("ibv_query_device", "ibv_query_port"):
        getattr(library, one).restype = ctypes.c_int
    library.ibv_free_device_list.argtypes = (ctypes.POINTER(ctypes.c_void_p),)
    library.ibv_close_device.argtypes = (ctypes.c_void_p,)
    count = ctypes.c_int()
    listed = library.ibv_get_device_list(ctypes.byref(count))
    if not listed:
        return {}
    try:
        return dict(filter(None, (_device(library, listed[n], ports) for n in range(count.value))))
    finally:
        library.ibv_free_device_list(listed)


def _device(library: ctypes.CDLL, handle: int | None, ports: dict[str, list[int]]) -> tuple[str, DeviceVerbs] | None:
    name = (library.ibv_get_device_name(handle) or b"").decode(errors="replace")
    context = library.ibv_open_device(handle) if name in ports else None
    if not context:
        return None
    try:
        found = _DeviceAttributes()
        if library.ibv_query_device(ctypes.c_void_p(context), ctypes.byref(found)):
            return None
        told = {number: port for number in ports[name] if (port := _port(library, context, number))}
        return name, DeviceVerbs(found.vendor_id, found.vendor_part_id, found.hw_ver, told)
    finally:
        library.ibv_close_device(context)


def _port(library: ctypes.CDLL, context: int, number: int) -> PortVerbs | None:
    found = _PortAttributes()
    if library.ibv_query_port(ctypes.c_void_p(context), ctypes.c_uint8(number), ctypes.byref(found)):
        return None
    return PortVerbs(_MTU.get(found.max_mtu, 0), _MTU.get(found.active_mtu, 0))
