"""NVIDIA GPUs in NVML's order, which is PCI bus order. Without the library or the driver there are no GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from types import ModuleType

# How two GPUs are connected, from near to far, in words of `nvidia-smi topo -m`: NVLink, one board, one PCIe switch,
# several, a host bridge, a NUMA node, and across sockets.
DISTANCES = ("NVLink", "PSB", "PIX", "PXB", "PHB", "NODE", "SYS")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. `memory` in bytes; `pci`: its address in sysfs format, or "". `distances`: to others by UUID, as places
    in DISTANCES; empty if that is not known."""

    index: int
    uuid: str
    name: str
    memory: int
    pci: str = ""
    distances: tuple[tuple[str, int], ...] = ()

    def distance(self, uuid: str) -> int:
        """To another one; one that is not known counts as farther than all."""
        return dict(self.distances).get(uuid, len(DISTANCES))


@dataclass(frozen=True, slots=True)
class GpuUse:
    """Memory in use in bytes: in total, and per process as the driver reports it."""

    used: int
    by_pid: dict[int, int]


def read_gpus() -> tuple[Gpu, ...]:
    """The GPUs that NVML lists; empty without the NVML binding, a driver or a device."""
    pynvml = _started()
    if pynvml is None:
        return ()
    try:
        count = range(pynvml.nvmlDeviceGetCount())
        return _with_distances(pynvml, tuple(gpu for index in count if (gpu := _able(pynvml, index)) is not None))
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()


def gpu_use(uuids: Sequence[str]) -> dict[str, GpuUse]:
    """Current memory use of these GPUs. GPUs that the driver does not report are left out."""
    pynvml = _started()
    if pynvml is None:
        return {}
    found = {}
    try:
        for uuid in uuids:
            try:
                handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
                used = int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
                entries = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
                # The driver may hide another user's share.
                by_pid = {int(entry.pid): int(entry.usedGpuMemory or 0) for entry in entries}
            except pynvml.NVMLError:
                continue
            found[uuid] = GpuUse(used, by_pid)
    finally:
        pynvml.nvmlShutdown()
    return found


def gpu_holders(uuids: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Pids that use each of these GPUs now, as far as the driver reports them."""
    return {uuid: tuple(sorted(use.by_pid)) for uuid, use in gpu_use(uuids).items() if use.by_pid}


def _started() -> ModuleType | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    module: ModuleType = pynvml
    return module


def _able(pynvml: ModuleType, index: int) -> Gpu | None:
    """One GPU; None if it is lost or not accessible to this user."""
    try:
        return gpu_of(pynvml, index)
    except pynvml.NVMLError:
        return None


def gpu_of(pynvml: ModuleType, index: int) -> Gpu:
    """One GPU by NVML index. Raises NVMLError."""
    # pynvml has no types, so every value is converted here.
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    return Gpu(
        index=index,
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        memory=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        pci=_pci(pynvml, handle),
    )


def _with_distances(pynvml: ModuleType, gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """The GPUs with their distances from each other, as far as the driver tells."""
    known = {(one.uuid, other.uuid): _distance(pynvml, one, other) for one, other in combinations(gpus, 2)}
    found = []
    for gpu in gpus:
        near = [(pair, far) for pair, far in known.items() if gpu.uuid in pair and far is not None]
        others = tuple((pair[0] if pair[1] == gpu.uuid else pair[1], far) for pair, far in near)
        found.append(replace(gpu, distances=others))
    return tuple(found)


def _distance(pynvml: ModuleType, one: Gpu, other: Gpu) -> int | None:
    try:
        handles = [pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid) for gpu in (one, other)]
        if _has_nvlink(pynvml, handles):
            return 0
        # NVML's levels are tens, from one board to the whole system.
        return min(int(pynvml.nvmlDeviceGetTopologyCommonAncestor(*handles)) // 10 + 1, len(DISTANCES) - 1)
    except pynvml.NVMLError:
        return None


def _has_nvlink(pynvml: ModuleType, handles: list[object]) -> bool:
    """Whether two GPUs reach each other by NVLink, directly or through switches."""
    try:
        status = pynvml.nvmlDeviceGetP2PStatus(*handles, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
    except pynvml.NVMLError:
        return False
    return bool(status == pynvml.NVML_P2P_STATUS_OK)


def _pci(pynvml: ModuleType, handle: object) -> str:
    """The PCI address in sysfs format: sysfs writes the domain with four digits, NVML with eight."""
    try:
        address = _text(pynvml.nvmlDeviceGetPciInfo(handle).busId).lower()
    except pynvml.NVMLError:
        return ""
    domain, _, rest = address.partition(":")
    return f"{domain[-4:]}:{rest}" if rest else ""


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
