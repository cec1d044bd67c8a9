"""Checks of the machine: limits, memory, shared memory, clock. `proc_root` and `dev_root` can be planted."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pdctl.doctor import Finding, Severity
from pdctl.host.memory import read_memory

# A proxy's connections and an engine's peers, with room; and what a few clients need. The project's own figures.
_GOOD_FILES, _LEAST_FILES = 65536, 4096
# Docker gives 64 MiB; this is what NCCL and torch workers of one model come by with.
_LEAST_SHM = 1 << 30
_STA_UNSYNC = 0x0040  # linux/timex.h
_CAP_IPC_LOCK = 14  # linux/capability.h


@dataclass(frozen=True, slots=True)
class HostScene:
    """`pinned_bytes`: memory that RDMA would pin; 0 where no RDMA is used."""

    proc_root: Path = Path("/proc")
    shm: Path = Path("/dev/shm")  # noqa: S108 - it is what engines share
    pinned_bytes: int = 0
    shared_bytes: int = 0


def check(scene: HostScene) -> list[Finding]:
    """All checks."""
    return [finding for one in CHECKS for finding in one(scene)]


def files(_: HostScene) -> Iterator[Finding]:
    """Open files: what children get is the hard limit, which pdctl raises them to."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < _GOOD_FILES:
        yield Finding(
            "limit.files",
            Severity.WARNING if hard < _LEAST_FILES else Severity.INFO,
            "host",
            f"{hard} open files at most",
            f"{_GOOD_FILES}",
            "RLIMIT_NOFILE",
            "a busy proxy runs out of descriptors",
            "systemd: LimitNOFILE=1048576; docker: --ulimit nofile=1048576",
        )
    else:
        yield Finding("limit.files", Severity.OK, "host", f"{hard} open files at most")


def memlock(scene: HostScene) -> Iterator[Finding]:
    """RDMA pins its pools; with CAP_IPC_LOCK the limit does not count."""
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    unlimited = hard == resource.RLIM_INFINITY or _has_ipc_lock(scene.proc_root)
    shown = "unlimited" if unlimited else f"{hard >> 20} MiB"
    if not scene.pinned_bytes or unlimited or hard >= scene.pinned_bytes:
        yield Finding("limit.memlock", Severity.OK, "host", f"locked memory: {shown}")
        return
    yield Finding(
        "limit.memlock",
        Severity.CRITICAL,
        "host",
        f"locked memory: {shown}",
        f"{scene.pinned_bytes >> 20} MiB, the KV pools",
        "RLIMIT_MEMLOCK",
        "registering a pool with an RDMA device fails",
        "systemd: LimitMEMLOCK=infinity; docker: --ulimit memlock=-1 --cap-add IPC_LOCK; or /etc/security/limits.conf",
        "Mooncake troubleshooting guide",
    )


def shared_memory(scene: HostScene) -> Iterator[Finding]:
    """Where it is small (docker gives 64 MiB), libraries that share memory between processes fail late."""
    try:
        found = os.statvfs(scene.shm)
    except OSError as failure:
        yield Finding("shm.size", Severity.UNKNOWN, "host", f"{scene.shm}: {failure.strerror}", "", str(scene.shm))
        return
    size = found.f_blocks * found.f_frsize
    if size < _LEAST_SHM:
        yield Finding(
            "shm.size",
            Severity.WARNING,
            "host",
            f"{scene.shm} has {size >> 20} MiB",
            f"{_LEAST_SHM >> 20} MiB",
            str(scene.shm),
            "NCCL and torch workers share memory there",
            "docker: --shm-size=8g; else: mount -o remount,size=8G /dev/shm",
        )
    else:
        yield Finding("shm.size", Severity.OK, "host", f"{scene.shm} has {size / 2**30:.1f} GiB")


def memory(scene: HostScene) -> Iterator[Finding]:
    """What the KV pools of a topology need beside what is free."""
    total, available = read_memory(scene.proc_root)
    shown = f"{available / 2**30:.1f} GiB of {total / 2**30:.1f} GiB free"
    if scene.shared_bytes > available:
        yield Finding(
            "memory.free",
            Severity.WARNING,
            "host",
            shown,
            f"{scene.shared_bytes / 2**30:.1f} GiB for the KV pools",
            "/proc/meminfo",
            "engines will be killed for their memory",
            "lower kv_cache_gb or replicas, or end other programs",
        )
    else:
        yield Finding("memory.free", Severity.OK, "host", shown)


def clock(_: HostScene) -> Iterator[Finding]:
    """Traces and TLS across hosts go by it."""
    status = _clock_status()
    if status is None:
        yield Finding("clock.sync", Severity.UNKNOWN, "host", "the kernel does not tell", "", "adjtimex(2)")
    elif status & _STA_UNSYNC:
        yield Finding(
            "clock.sync",
            Severity.INFO,
            "host",
            "the clock is not synchronised",
            "NTP, where several hosts serve",
            "adjtimex(2)",
            "",
            "systemctl enable --now systemd-timesyncd, or chrony",
        )
    else:
        yield Finding("clock.sync", Severity.OK, "host", "the clock is synchronised")


def _clock_status() -> int | None:
    import ctypes

    class Timex(ctypes.Structure):
        _fields_ = (
            ("modes", ctypes.c_uint),
            ("offset", ctypes.c_long),
            ("freq", ctypes.c_long),
            ("maxerror", ctypes.c_long),
            ("esterror", ctypes.c_long),
            ("status", ctypes.c_int),
            ("rest", ctypes.c_char * 256),
        )

    found = Timex()
    return int(found.status) if ctypes.CDLL(None).adjtimex(ctypes.byref(found)) >= 0 else None


def _has_ipc_lock(proc_root: Path) -> bool:
    try:
        lines = (proc_root / "self/status").read_text().splitlines()
    except OSError:
        return False
    effective = next((line.split()[1] for line in lines if line.startswith("CapEff:")), "0")
    return bool(int(effective, 16) >> _CAP_IPC_LOCK & 1)


CHECKS: tuple[Callable[[HostScene], Iterator[Finding]], ...] = (files, memlock, shared_memory, memory, clock)
