"""Checks of the host: limits, memory, shared memory, clock, containers. Tests can replace `proc_root`."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pdctl.doctor import Finding, Severity
from pdctl.host.memory import read_group_room, read_memory

# Enough for a busy proxy's connections and an engine's peers; and enough for a few clients. pdctl's own numbers.
_GOOD_FILES, _LEAST_FILES = 65536, 4096
# Docker's default is 64 MiB; NCCL and torch workers of one model need about this much.
_LEAST_SHM = 1 << 30
# Memory that transfer libraries lock besides the pools.
_MEMLOCK_SLACK_KIB = 1024
# From Mooncake's guide, for pools of hundreds of gigabytes.
_GOOD_MAPS = 16_777_216
_STA_UNSYNC = 0x0040  # linux/timex.h
_CAP_IPC_LOCK = 14  # linux/capability.h
_UNLIMITED = 1 << 64
# A disk read takes milliseconds: a process that is waiting in each of these samples is stuck.
_LOOKS, _LOOK_S = 5, 0.1


@dataclass(frozen=True, slots=True)
class HostFacts:
    """Facts for host checks. `pinned_bytes`: memory that RDMA pins in one process; 0 without RDMA. `shared_bytes`: KV
    pools in host memory, including mirrors of GPU pools; `weight_bytes`: weights of engines on the CPU; `children`:
    pids of the running service."""

    proc_root: Path = Path("/proc")
    sysfs_root: Path = Path("/sys")
    root: Path = Path("/")
    env: dict[str, str] = field(default_factory=dict)
    shm: Path = Path("/dev/shm")  # noqa: S108 - it is what engines share
    pinned_bytes: int = 0
    shared_bytes: int = 0
    weight_bytes: int = 0
    children: tuple[int, ...] = ()


def check(facts: HostFacts) -> list[Finding]:
    """Run all checks."""
    return [finding for one in CHECKS for finding in one(facts)]


def files(_: HostFacts) -> Iterator[Finding]:
    """The limit of open files. pdctl raises the soft limit of its children to the hard limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < _GOOD_FILES:
        yield Finding(
            "limit.files",
            Severity.WARNING if hard < _LEAST_FILES else Severity.INFO,
            "host",
            f"at most {hard} open files",
            f"{_GOOD_FILES}",
            "RLIMIT_NOFILE",
            "a busy proxy may run out of file descriptors",
            "systemd: LimitNOFILE=1048576; docker: --ulimit nofile=1048576",
        )
    else:
        yield Finding("limit.files", Severity.OK, "host", f"at most {hard} open files")


def memlock(facts: HostFacts) -> Iterator[Finding]:
    """The limit of locked memory: RDMA pins the pools. CAP_IPC_LOCK lifts it. A running process keeps its own limit."""
    limits = {f"pid {pid}": _memlock_of(facts.proc_root / str(pid)) for pid in facts.children}
    subject, hard = min(limits.items(), key=lambda item: item[1], default=("host", _memlock_here(facts)))
    unlimited = hard == _UNLIMITED
    shown = "unlimited" if unlimited else f"{hard >> 20} MiB"
    if not facts.pinned_bytes or unlimited or hard >= facts.pinned_bytes:
        yield Finding("limit.memlock", Severity.OK, "host", f"locked memory: {shown}")
        return
    yield Finding(
        "limit.memlock",
        Severity.CRITICAL,
        subject,
        f"locked memory: {shown}",
        f"at least {facts.pinned_bytes >> 20} MiB, the size of the KV pools",
        f"/proc/{subject.removeprefix('pid ')}/limits" if limits else "RLIMIT_MEMLOCK",
        "registering a pool with an RDMA device fails",
        f"ulimit -l {(facts.pinned_bytes >> 10) + _MEMLOCK_SLACK_KIB}; systemd: LimitMEMLOCK=infinity; "
        "docker: --ulimit memlock=-1 --cap-add IPC_LOCK",
        "Mooncake troubleshooting guide",
    )


def stuck(facts: HostFacts) -> Iterator[Finding]:
    """Processes of the service in uninterruptible sleep: often the first sign of a hanging driver."""
    waiting = [pid for pid in facts.children if _state(facts.proc_root, pid) == "D"]
    for _ in range(_LOOKS if waiting else 0):
        time.sleep(_LOOK_S)
        waiting = [pid for pid in waiting if _state(facts.proc_root, pid) == "D"]
    for pid in waiting:
        yield Finding(
            "host.stuck", Severity.CRITICAL, f"pid {pid}", f"in uninterruptible sleep for {_LOOKS * _LOOK_S:.1f} s",
            "running or sleeping", f"/proc/{pid}/stat",
            "a driver or a file system does not answer; signals have no effect",
            f"cat /proc/{pid}/stack; dmesg | tail; reboot if it persists",
        )  # fmt: skip


def _state(proc_root: Path, pid: int) -> str:
    """The process state, one letter (proc(5)); "" if the process is gone."""
    try:
        return (proc_root / str(pid) / "stat").read_text(errors="replace").rpartition(") ")[2][:1]
    except OSError:
        return ""


def shared_memory(facts: HostFacts) -> Iterator[Finding]:
    """The size of /dev/shm: if it is small (Docker: 64 MiB), libraries that share memory fail late."""
    try:
        found = os.statvfs(facts.shm)
    except OSError as failure:
        yield Finding("shm.size", Severity.UNKNOWN, "host", f"{facts.shm}: {failure.strerror}", "", str(facts.shm))
        return
    size = found.f_blocks * found.f_frsize
    if size < _LEAST_SHM:
        yield Finding(
            "shm.size",
            Severity.WARNING,
            "host",
            f"{facts.shm} has {size >> 20} MiB",
            f"{_LEAST_SHM >> 20} MiB",
            str(facts.shm),
            "NCCL and torch workers share memory there",
            "mount -o remount,size=8G /dev/shm; docker: --shm-size=8g",
        )
    else:
        yield Finding("shm.size", Severity.OK, "host", f"{facts.shm} has {size / 2**30:.1f} GiB")


def memory(facts: HostFacts) -> Iterator[Finding]:
    """Whether the free memory is enough for the topology's KV pools and weights."""
    total, available = read_memory(facts.proc_root)
    shown, evidence = f"{available / 2**30:.1f} GiB of {total / 2**30:.1f} GiB free", "/proc/meminfo"
    room = read_group_room(facts.proc_root, facts.sysfs_root)
    if room is not None and room < available:
        available, evidence = room, "memory.max, memory.current"
        shown = f"{room / 2**30:.1f} GiB left within this cgroup's limit"
    wanted = facts.shared_bytes + facts.weight_bytes
    if wanted > available:
        yield Finding(
            "memory.free",
            Severity.WARNING,
            "host",
            shown,
            f"{wanted / 2**30:.1f} GiB for KV pools and weights",
            evidence,
            "the kernel will kill engines (out of memory)",
            "lower kv_cache_gb or replicas, stop other programs, or raise the container's limit",
        )
    else:
        yield Finding("memory.free", Severity.OK, "host", shown)


def clock(_: HostFacts) -> Iterator[Finding]:
    """Whether the clock is synchronised: traces and TLS across hosts depend on it."""
    status = _clock_status()
    if status is None:
        yield Finding(
            "clock.sync", Severity.UNKNOWN, "host", "the kernel does not report the clock's state", "", "adjtimex(2)"
        )
    elif status & _STA_UNSYNC:
        yield Finding(
            "clock.sync",
            Severity.INFO,
            "host",
            "the clock is not synchronised",
            "NTP, if several hosts serve",
            "adjtimex(2)",
            "",
            "systemctl enable --now systemd-timesyncd, or chrony",
        )
    else:
        yield Finding("clock.sync", Severity.OK, "host", "the clock is synchronised")


def hugepages(facts: HostFacts) -> Iterator[Finding]:
    """Huge pages, if Mooncake's store is configured to use them."""
    if facts.env.get("MC_STORE_USE_HUGEPAGE", "0") in ("", "0"):
        return
    free = _meminfo(facts.proc_root, "HugePages_Free")
    if free == 0:
        yield Finding(
            "host.hugepages", Severity.CRITICAL, "host", "MC_STORE_USE_HUGEPAGE is set, but no huge page is free",
            "free huge pages", "/proc/meminfo", "allocating the store's memory fails",
            "sysctl vm.nr_hugepages=N, or: unset MC_STORE_USE_HUGEPAGE",
        )  # fmt: skip


def map_count(facts: HostFacts) -> Iterator[Finding]:
    """The limit of memory mappings: pools registered block by block need many (Mooncake troubleshooting guide)."""
    count = _number(facts.proc_root / "sys/vm/max_map_count")
    if facts.pinned_bytes and count is not None and count < _GOOD_MAPS:
        yield Finding(
            "host.map_count", Severity.INFO, "host", f"vm.max_map_count = {count}", f"{_GOOD_MAPS} for large pools",
            "/proc/sys/vm/max_map_count", "registering large pools may fail", f"sysctl vm.max_map_count={_GOOD_MAPS}",
            "Mooncake troubleshooting guide",
        )  # fmt: skip


def numa_balancing(facts: HostFacts) -> Iterator[Finding]:
    """Automatic NUMA balancing: it moves pages of processes that pdctl has pinned."""
    nodes = list((facts.sysfs_root / "devices/system/node").glob("node[0-9]*"))
    if len(nodes) > 1 and _number(facts.proc_root / "sys/kernel/numa_balancing"):
        yield Finding(
            "host.numa_balancing", Severity.INFO, "host", f"automatic NUMA balancing over {len(nodes)} nodes", "off",
            "/proc/sys/kernel/numa_balancing", "needless page faults in engines that are pinned already",
            "sysctl kernel.numa_balancing=0",
        )  # fmt: skip


def container(facts: HostFacts) -> Iterator[Finding]:
    """Whether a container has the devices and capabilities that RDMA needs."""
    marks = [name for name in (".dockerenv", "run/.containerenv") if (facts.root / name).exists()]
    if not marks:
        return
    lacks = ["--cap-add=IPC_LOCK"] if facts.pinned_bytes and not _may_lock(facts) else []
    if facts.pinned_bytes and not (facts.root / "dev/infiniband").is_dir():
        lacks.append("--device=/dev/infiniband")
    if lacks:
        yield Finding(
            "host.container", Severity.CRITICAL, "host", "the container lacks options that RDMA needs", " ".join(lacks),
            f"/{marks[0]}, CapEff", "devices cannot be opened, or memory cannot be registered",
            f"docker run {' '.join(lacks)} --ulimit memlock=-1",
        )  # fmt: skip
    else:
        yield Finding("host.container", Severity.OK, "host", "in a container")


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _meminfo(proc_root: Path, name: str) -> int:
    for line in (proc_root / "meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    return 0


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


def _may_lock(facts: HostFacts) -> bool:
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    return hard == resource.RLIM_INFINITY or hard >= facts.pinned_bytes or _has_ipc_lock(facts.proc_root)


def _memlock_here(facts: HostFacts) -> int:
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    return _UNLIMITED if hard == resource.RLIM_INFINITY or _has_ipc_lock(facts.proc_root) else hard


def _memlock_of(process: Path) -> int:
    """A running process's hard limit in bytes; unlimited if it cannot be read any more."""
    try:
        lines = (process / "limits").read_text().splitlines()
    except OSError:
        return _UNLIMITED
    words = next((line.split() for line in lines if line.startswith("Max locked memory")), [])
    is_number = len(words) > 4 and words[4].isdecimal()
    return int(words[4]) if is_number and not _has_ipc_lock(process.parent, process.name) else _UNLIMITED


def _has_ipc_lock(proc_root: Path, process: str = "self") -> bool:
    try:
        lines = (proc_root / process / "status").read_text().splitlines()
    except OSError:
        return False
    effective = next((line.split()[1] for line in lines if line.startswith("CapEff:")), "0")
    return bool(int(effective, 16) >> _CAP_IPC_LOCK & 1)


CHECKS: tuple[Callable[[HostFacts], Iterator[Finding]], ...] = (
    files, memlock, stuck, shared_memory, memory, clock, hugepages, map_count, numa_balancing, container,
)  # fmt: skip
