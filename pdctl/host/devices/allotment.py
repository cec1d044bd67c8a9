"""Which GPUs and RDMA devices the environment makes available to pdctl.

For GPUs, CUDA's own variable comes first, by CUDA's rules (an invalid entry ends the list; UUIDs may be prefixes); then
those of the container runtime and of Slurm. RDMA devices are limited by the variables of the libraries that use them,
and a container may lack a device's node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pdctl.host.devices.gpu import Gpu
from pdctl.host.devices.rdma import RdmaDevice

_CUDA = "CUDA_VISIBLE_DEVICES"
# Used if CUDA's variable is not set. They also list devices by index or UUID.
_OTHERS = ("NVIDIA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
_ALL, _NONE = ("", "all"), ("none", "void", "NoDevFiles", "-1")


def allotted(gpus: Sequence[Gpu], environ: Mapping[str, str]) -> tuple[tuple[Gpu, ...], str]:
    """The available GPUs in the environment's order, and the variable that limits them ("" if none does).

    Indices are the driver's, in PCI order.
    """
    if _CUDA in environ:
        return _listed(gpus, environ[_CUDA]), f"{_CUDA}={environ[_CUDA]}"
    for name in _OTHERS:
        value = environ.get(name, "")
        # If the other GPUs are already hidden, the driver renumbers the rest, but the list has the old numbers.
        is_done = value.replace(",", "").isdecimal() and len(value.split(",")) == len(gpus)
        if value not in _ALL and not is_done:
            return _listed(gpus, value), f"{name}={value}"
    return tuple(gpus), ""


# Device lists of Mooncake, UCX (nixl) and NCCL. NCCL matches prefixes unless the list begins with =.
_RDMA = ("MC_MS_FILTERS", "MC_TE_FILTERS", "UCX_NET_DEVICES", "NCCL_IB_HCA")


def allotted_rdma(devices: Sequence[RdmaDevice], environ: Mapping[str, str]) -> tuple[tuple[RdmaDevice, ...], str]:
    """The available RDMA devices, and the variable or folder that limits them ("" if none does)."""
    ours = tuple(device for device in devices if device.has_node)
    hidden = "/dev/infiniband" if len(ours) < len(devices) else ""
    for variable in _RDMA:
        given = environ.get(variable, "")
        words = [word.partition(":")[0].strip() for word in given.lstrip("^=").split(",")]
        if words in ([""], ["all"]):
            continue
        begins = variable == "NCCL_IB_HCA" and not given.lstrip("^").startswith("=")
        wanted = not given.startswith("^")
        found = tuple(device for device in ours if _is_named(device.name, words, begins) == wanted)
        return found, f"{variable}={given}"
    return ours, hidden


def _is_named(device: str, words: Sequence[str], begins: bool) -> bool:
    return any(word and (device == word or (begins and device.startswith(word))) for word in words)


def _listed(gpus: Sequence[Gpu], value: str) -> tuple[Gpu, ...]:
    found: list[Gpu] = []
    for word in value.split(","):
        gpu = _meant(gpus, word.strip())
        # As in CUDA: an invalid or repeated entry ends the list.
        if gpu is None or gpu in found:
            break
        found.append(gpu)
    return tuple(found)


def _meant(gpus: Sequence[Gpu], word: str) -> Gpu | None:
    if not word or word in _NONE:
        return None
    if word.isdecimal():
        return next((gpu for gpu in gpus if gpu.index == int(word)), None)
    if word.startswith("MIG-"):
        # NVML lists whole GPUs, so a MIG slice is used by its name. The rest of its GPU is not available.
        return Gpu(-1, word, "MIG slice", 0)
    found = [gpu for gpu in gpus if gpu.uuid.startswith(word)]
    return found[0] if len(found) == 1 else None
