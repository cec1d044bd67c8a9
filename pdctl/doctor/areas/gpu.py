"""Checks of NVIDIA GPUs: health from NVML, memory use by other processes, driver version."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pdctl.doctor import Finding, Severity
from pdctl.host.devices.gpu_health import MISMATCH, GpuHealth, GpuReport

# Memory that the driver and idle contexts use; more than this is a running workload.
_BASELINE = 1 << 30
# Clock event reasons (nvml.h) that indicate a problem: hardware slowdown, software and hardware thermal, power brake.
_THROTTLED = {0x8: "hardware slowdown", 0x20: "software thermal", 0x40: "hardware thermal", 0x80: "power brake"}
# Azure NHC, check_gpu_ecc: replace a card with more remapped rows.
_MOST_REMAPPED = 512
_EXCLUSIVE_PROCESS, _PROHIBITED = 3, 2
_PROC_GPUS = "driver/nvidia/gpus"


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """Facts for GPU checks. `indices`: GPUs that the topology uses; None for all. `ours`: pids of the running service;
    `wanted`: bytes that engines will allocate, by GPU.

    `shared`: GPUs with several engines; `runtime_cuda`: the CUDA version that torch was built for.
    """

    report: GpuReport
    indices: frozenset[int] | None = None
    is_wanted: bool = False
    shared: frozenset[int] = frozenset()
    ours: frozenset[int] = frozenset()
    wanted: dict[int, int] = field(default_factory=dict, hash=False)
    runtime_cuda: tuple[int, int] | None = None
    proc_root: Path = Path("/proc")

    def judged(self) -> Iterator[GpuHealth]:
        """GPUs that the topology uses."""
        return (found for found in self.report.gpus if self.indices is None or found.gpu.index in self.indices)


def check(facts: GpuFacts) -> list[Finding]:
    """Run all checks."""
    return [finding for one in CHECKS for finding in one(facts)]


def present(facts: GpuFacts) -> Iterator[Finding]:
    """Whether there are GPUs. Their absence is a problem only if the topology needs one."""
    report = facts.report
    if report.absence == MISMATCH:
        yield Finding(
            "gpu.driver", Severity.CRITICAL, "gpu", report.absence, "one version", "NVML",
            "the driver was updated while the old module was loaded", "reboot, or reload the nvidia modules",
        )  # fmt: skip
    elif not report.gpus:
        severity = Severity.CRITICAL if facts.is_wanted else Severity.INFO
        wish = 'a GPU: the topology has device = "cuda"' if facts.is_wanted else "not needed: engines run on the CPU"
        fix = 'check nvidia-smi; in a container: --gpus all; or set device = "cpu"' if facts.is_wanted else ""
        yield Finding("gpu.none", severity, "gpu", report.absence, wish, "NVML", "", fix)
    else:
        for found in report.gpus:
            observed = f"{found.gpu.name}, {found.gpu.memory / 2**30:.0f} GiB, {found.gpu.uuid}"
            yield Finding("gpu.present", Severity.OK, _name(found), observed)


def counted(facts: GpuFacts) -> Iterator[Finding]:
    """GPUs that the driver knows but NVML does not list: fallen off the bus, or hidden from this container."""
    for said in facts.report.lost:
        yield Finding(
            "gpu.count", Severity.CRITICAL, said.partition(":")[0], said.partition(": ")[2], "a GPU that answers",
            "NVML",
            "it fell off the bus (Xid 79), or this user has no access to it", "dmesg | grep Xid; reset it or reboot",
        )  # fmt: skip
    try:
        known = [name for name in os.listdir(facts.proc_root / _PROC_GPUS) if name.count(":") == 2]  # noqa: PTH208
    except OSError:
        return
    listed = {found.gpu.pci.lower() for found in facts.report.gpus}
    for address in sorted(known):
        if facts.report.gpus and address.lower() not in listed:
            yield Finding(
                "gpu.count", Severity.CRITICAL if facts.is_wanted else Severity.WARNING, f"GPU at {address}",
                "the driver knows it, but NVML does not list it", "known to both", f"/proc/{_PROC_GPUS}",
                "it fell off the bus (Xid 79), or is hidden from this container",
                "dmesg | grep Xid; reset it or reboot",
            )  # fmt: skip


def versions(facts: GpuFacts) -> Iterator[Finding]:
    """A CUDA runtime with a newer major version than the driver supports does not start (CUDA compatibility guide)."""
    runtime, driver = facts.runtime_cuda, facts.report.cuda
    if not facts.report.gpus or runtime is None or driver is None:
        return
    observed = f"driver {facts.report.driver} supports CUDA {_dotted(driver)}; torch was built for {_dotted(runtime)}"
    if runtime[0] > driver[0]:
        yield Finding(
            "gpu.cuda", Severity.CRITICAL, "gpu", observed, f"CUDA {runtime[0]} or newer", "NVML, package metadata",
            "torch will not find a GPU", f"update the driver, or install torch for CUDA {driver[0]}",
        )  # fmt: skip
    elif runtime > driver:
        yield Finding(
            "gpu.cuda", Severity.WARNING, "gpu", observed, f"CUDA {_dotted(runtime)}", "NVML, package metadata",
            "minor versions are compatible, except for code compiled at run time (PTX)", "update the driver",
        )  # fmt: skip
    else:
        yield Finding("gpu.cuda", Severity.OK, "gpu", observed)


def memory_errors(facts: GpuFacts) -> Iterator[Finding]:
    """Uncorrected ECC errors, and row remaps."""
    for found in facts.judged():
        if found.ecc_errors:
            yield Finding(
                "gpu.ecc", Severity.CRITICAL, _name(found), f"{found.ecc_errors} uncorrected memory errors", "0",
                "NVML, volatile ECC counts", "memory was corrupted since the driver was loaded",
                f"nvidia-smi --gpu-reset -i {found.gpu.index}; replace the card if they come back",
            )  # fmt: skip
        rows = found.rows
        if rows is None or not (rows.is_pending or rows.has_failed or rows.uncorrected > _MOST_REMAPPED):
            continue
        observed = "a row remap failed" if rows.has_failed else "a row remap is pending until a reset"
        observed = observed if rows.has_failed or rows.is_pending else f"{rows.uncorrected} rows were remapped"
        yield Finding(
            "gpu.rows", Severity.CRITICAL, _name(found), observed, f"none pending or failed, at most {_MOST_REMAPPED}",
            "NVML, remapped rows", "worn memory",
            "replace the card" if rows.has_failed else f"nvidia-smi --gpu-reset -i {found.gpu.index}", "Azure NHC",
        )  # fmt: skip


def throttled(facts: GpuFacts) -> Iterator[Finding]:
    """Throttling for reasons other than idleness and the power cap."""
    for found in facts.judged():
        reasons = [name for bit, name in _THROTTLED.items() if (found.throttle or 0) & bit]
        if reasons:
            yield Finding(
                "gpu.throttle", Severity.WARNING, _name(found), ", ".join(reasons), "none",
                "NVML, clocks event reasons",
                "heat or power", "check cooling and power: nvidia-smi -q -d PERFORMANCE,TEMPERATURE",
            )  # fmt: skip


def links(facts: GpuFacts) -> Iterator[Finding]:
    """NVLinks that are down while others are up (NVIDIA's validation accepts none)."""
    for found in facts.judged():
        down = [str(number) for number, is_up in enumerate(found.links) if not is_up]
        if down and len(down) < len(found.links):
            yield Finding(
                "gpu.nvlink", Severity.CRITICAL, _name(found), f"NVLinks {', '.join(down)} are down", "all up",
                "NVML, NVLink state", "GPUs fall back to fewer links, or to PCIe",
                "nvidia-smi nvlink --status; systemctl status nvidia-fabricmanager",
            )  # fmt: skip


def lanes(facts: GpuFacts) -> Iterator[Finding]:
    """Fewer PCIe lanes than the card has. The speed is not checked: GPUs lower it when idle."""
    for found in facts.judged():
        if found.lanes and 0 < found.lanes[0] < found.lanes[1]:
            yield Finding(
                "gpu.lanes", Severity.WARNING, _name(found), f"{found.lanes[0]} PCIe lanes", f"{found.lanes[1]}",
                "NVML", "a slot, riser or BIOS setting below the card's best", "reseat it; check the slot and the BIOS",
            )  # fmt: skip


def held(facts: GpuFacts) -> Iterator[Finding]:
    """Memory in use before a start. NVML reports host pids, which may not exist in this container."""
    for found in facts.judged():
        strangers = {pid: size for pid, size in found.users.items() if pid not in facts.ours}
        used = found.used - sum(size for pid, size in found.users.items() if pid in facts.ours)
        if used <= _BASELINE:
            continue
        whose = (
            ", ".join(f"pid {pid} {_command(facts.proc_root, pid)}" for pid in sorted(strangers))
            or "an unknown process"
        )
        alive = [pid for pid in strangers if (facts.proc_root / str(pid)).exists()]
        fix = f"stop it: kill {' '.join(map(str, sorted(alive)))}" if alive else (
            f"nvidia-smi; fuser -v /dev/nvidia{found.gpu.index}; processes of a container are visible only on its host"
        )  # fmt: skip
        yield Finding(
            "gpu.mem_held", _weight_of(facts, found, used), _name(found),
            f"{used / 2**30:.1f} GiB are in use by {whose}", f"at most {_BASELINE >> 30} GiB before a start", "NVML",
            "engines may not get the memory that they are configured for", fix,
        )  # fmt: skip


def _weight_of(facts: GpuFacts, found: GpuHealth, used: int) -> Severity:
    """Critical if the remaining memory is less than the engines will allocate."""
    if not facts.is_wanted:
        return Severity.INFO
    left = found.gpu.memory - used
    return Severity.CRITICAL if left < facts.wanted.get(found.gpu.index, 0) else Severity.WARNING


def modes(facts: GpuFacts) -> Iterator[Finding]:
    """Modes in which engines cannot use the GPU."""
    for found in facts.judged():
        index = found.gpu.index
        if found.mig and facts.is_wanted:
            yield Finding(
                "gpu.mig", Severity.CRITICAL, _name(found), "MIG is on", "off", "NVML",
                "engines get the UUID of the whole GPU, which CUDA cannot use while MIG is on",
                f"nvidia-smi -i {index} -mig 0",
            )  # fmt: skip
        exclusive = found.compute_mode == _EXCLUSIVE_PROCESS and index in facts.shared
        if exclusive or (found.compute_mode == _PROHIBITED and facts.is_wanted):
            observed = "EXCLUSIVE_PROCESS, but several engines share the GPU" if exclusive else "PROHIBITED"
            yield Finding(
                "gpu.mode", Severity.CRITICAL, _name(found), f"compute mode {observed}", "DEFAULT", "NVML",
                "CUDA refuses engines", f"nvidia-smi -i {index} -c DEFAULT",
            )  # fmt: skip
        if found.persistence is False:
            yield Finding(
                "gpu.persistence", Severity.INFO, _name(found), "persistence mode is off", "on", "NVML",
                "the first process on the GPU waits seconds for the driver", f"nvidia-smi -i {index} -pm 1",
            )  # fmt: skip


def _name(found: GpuHealth) -> str:
    return f"GPU {found.gpu.index}"


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _command(proc_root: Path, pid: int) -> str:
    try:
        return f"({(proc_root / str(pid) / 'comm').read_text(errors='replace').strip()})"
    except OSError:
        return "(not visible from here)"


CHECKS: tuple[Callable[[GpuFacts], Iterator[Finding]], ...] = (
    present, counted, versions, memory_errors, throttled, links, lanes, held, modes,
)  # fmt: skip
