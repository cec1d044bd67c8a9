"""NVIDIA GPUs as NVML counts them, which is PCI bus order. No library, no driver: no GPUs, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. `memory` in bytes."""

    index: int
    uuid: str
    name: str
    memory: int


def read_gpus() -> tuple[Gpu, ...]:
    """The GPUs NVML lists; empty where there is no NVML binding, no driver or no device."""
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        return tuple(_read_one(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
    finally:
        pynvml.nvmlShutdown()


def _read_one(pynvml: object, index: int) -> Gpu:
    # pynvml has no types; every value is converted where it enters.
    get = pynvml.__dict__
    handle = get["nvmlDeviceGetHandleByIndex"](index)
    return Gpu(
        index=index,
        uuid=_text(get["nvmlDeviceGetUUID"](handle)),
        name=_text(get["nvmlDeviceGetName"](handle)),
        memory=int(get["nvmlDeviceGetMemoryInfo"](handle).total),
    )


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
