"""Health of NVIDIA GPUs, from NVML. An old driver or card may refuse any of the calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import TypeVar

from pdctl.host.devices.gpu import Gpu, gpu_of

_T = TypeVar("_T")

# Reasons why there is no GPU.
NO_BINDING = "nvidia-ml-py is not installed"
NO_LIBRARY = "the NVIDIA driver library is not installed"
NO_DRIVER = "the NVIDIA kernel driver is not loaded"
MISMATCH = "the driver's library and its kernel module have different versions"


@dataclass(frozen=True, slots=True)
class Rows:
    """Remapped memory rows: counts, whether a remap is pending until a reset, and whether one failed."""

    corrected: int
    uncorrected: int
    is_pending: bool
    has_failed: bool


@dataclass(frozen=True, slots=True)
class GpuHealth:
    """The health of one GPU. None for values that the driver does not report.

    `ecc_errors`: uncorrected since the driver was loaded; `throttle`: NVML's reasons as bits; `lanes`: current and
    maximum; `links`: whether each NVLink is up; `users`: memory in bytes by pid.
    """

    gpu: Gpu
    used: int = 0
    users: dict[int, int] = field(default_factory=dict, hash=False)
    ecc_errors: int | None = None
    rows: Rows | None = None
    throttle: int | None = None
    compute_mode: int | None = None
    mig: bool | None = None
    persistence: bool | None = None
    lanes: tuple[int, int] | None = None
    links: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class GpuReport:
    """All GPUs. `absence`: why there are none, else "". `cuda`: highest version that the driver supports, such as 12.4.
    `lost`: GPUs that the driver counts but cannot read, with the reason."""

    gpus: tuple[GpuHealth, ...] = ()
    absence: str = ""
    driver: str = ""
    cuda: tuple[int, int] | None = None
    lost: tuple[str, ...] = ()


def read_gpu_facts() -> GpuReport:
    """Read GPU health from NVML. Takes tens of milliseconds with a driver, one without."""
    try:
        import pynvml
    except ImportError:
        return GpuReport(absence=NO_BINDING)
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as failure:
        return GpuReport(absence=_absence(pynvml, failure))
    try:
        driver = _asked(pynvml, lambda: str(_text(pynvml.nvmlSystemGetDriverVersion()))) or ""
        version = _asked(pynvml, lambda: int(pynvml.nvmlSystemGetCudaDriverVersion_v2()))
        cuda = (version // 1000, version % 1000 // 10) if version else None
        gpus, lost = [], []
        for index in range(int(pynvml.nvmlDeviceGetCount())):
            try:
                gpus.append(_health(pynvml, index))
            except pynvml.NVMLError as failure:
                lost.append(f"GPU {index}: {failure}")
    except pynvml.NVMLError as failure:
        return GpuReport(absence=f"NVML fails: {failure}")
    finally:
        pynvml.nvmlShutdown()
    return GpuReport(tuple(gpus), "" if gpus else "the driver lists no GPU", driver, cuda, tuple(lost))


def _absence(pynvml: ModuleType, failure: Exception) -> str:
    reasons = {
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: NO_LIBRARY,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED: NO_DRIVER,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: MISMATCH,
    }
    return reasons.get(getattr(failure, "value", None), f"NVML fails: {failure}")


def _health(pynvml: ModuleType, index: int) -> GpuHealth:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)

    def ask(read: Callable[[], _T]) -> _T | None:
        return _asked(pynvml, read)

    return GpuHealth(
        gpu=gpu_of(pynvml, index),
        used=ask(lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)) or 0,
        users=ask(lambda: _users(pynvml, handle)) or {},
        ecc_errors=ask(
            lambda: int(
                pynvml.nvmlDeviceGetTotalEccErrors(
                    handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
                )
            )
        ),
        rows=ask(lambda: _rows(pynvml.nvmlDeviceGetRemappedRows(handle))),
        throttle=ask(lambda: int(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))),
        compute_mode=ask(lambda: int(pynvml.nvmlDeviceGetComputeMode(handle))),
        mig=ask(lambda: bool(pynvml.nvmlDeviceGetMigMode(handle)[0])),
        persistence=ask(lambda: bool(pynvml.nvmlDeviceGetPersistenceMode(handle))),
        lanes=ask(
            lambda: (
                int(pynvml.nvmlDeviceGetCurrPcieLinkWidth(handle)),
                int(pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle)),
            )
        ),
        links=_links(pynvml, handle),
    )


def _asked(pynvml: ModuleType, read: Callable[[], _T]) -> _T | None:
    """The result of `read`; None if the driver does not support the call."""
    try:
        return read()
    except pynvml.NVMLError:
        return None


def _users(pynvml: ModuleType, handle: object) -> dict[int, int]:
    entries = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    return {int(entry.pid): int(entry.usedGpuMemory or 0) for entry in entries}


def _rows(found: list[int]) -> Rows:
    return Rows(int(found[0]), int(found[1]), bool(found[2]), bool(found[3]))


def _is_up(pynvml: ModuleType, handle: object, number: int) -> bool:
    return bool(pynvml.nvmlDeviceGetNvLinkState(handle, number))


def _links(pynvml: ModuleType, handle: object) -> tuple[bool, ...]:
    """States of the card's NVLinks. The driver refuses numbers beyond the last link."""
    found: list[bool] = []
    for number in range(int(pynvml.NVML_NVLINK_MAX_LINKS)):
        state = _asked(pynvml, partial(_is_up, pynvml, handle, number))
        if state is None:
            break
        found.append(state)
    return tuple(found)


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
