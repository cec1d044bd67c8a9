"""Why a process ended: everything known at that moment, kept for `pdctl why`."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pdctl.control_api import ExitReport, LastExit, ResourceUse
from pdctl.host.kernel_log import parse_record
from pdctl.supervisor.process.logs import tail
from pdctl.supervisor.rundir.journal import now_text
from pdctl.supervisor.unit.lifecycle import Exit, describe_exit, signal_name

_LOG_LINES = 50
_KERNEL_WINDOW_S = 10.0
_KERNEL_LINES = 20
# Kernel messages about killed processes, GPUs and RDMA devices.
_TELLING = re.compile(
    r"oom|out of memory|killed process|segfault|traps:|NVRM|Xid|mlx5|infiniband|general protection", re.I
)
_MOST_KERNEL_BYTES = 8192
_XID = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9A-Fa-f:.]+)\): (\d+)")


@dataclass(frozen=True, slots=True)
class Ended:
    """A process's exit as observed. `by_us`: the signal that pdctl sent last, and why; `words`: its own last words."""

    name: str
    pid: int
    epoch: str
    started_at: float
    exit: Exit
    usage: resource.struct_rusage | None
    by_us: str
    expected: bool
    core_dumped: bool = False
    words: str = ""
    uses_gpus: bool = False

    @property
    def of_itself(self) -> bool:
        """Whether what it did may have ended it: a crash, or a hang that pdctl ended; nobody else's signal."""
        by_others = self.exit.signal in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT) and not self.by_us
        return self.exit != Exit(None, None) and not self.expected and not by_others


def told_of(ended: Ended, oom: bool = False, xid: str = "") -> LastExit:
    """The short form, as `status` shows it."""
    return LastExit(
        at=now_text(),
        code=ended.exit.code,
        signal=signal_name(ended.exit.signal) if ended.exit.signal is not None else None,
        reason=_reason(ended, oom, xid),
        expected=ended.expected,
        by=ended.by_us or ("the kernel, out of memory" if oom else _by_others(ended.exit)),
        oom=oom,
    )


def report(ended: Ended, log: Path, memory_group: Path | None, kernel_log: KernelLog) -> ExitReport:
    """One entry of the exits' file."""
    kernel = kernel_log.lines()
    oom = was_out_of_memory(ended.pid, kernel) or _group_was(memory_group)
    xid = gpu_error(kernel) if ended.uses_gpus else ""
    return ExitReport(
        **msgspec.structs.asdict(told_of(ended, oom, xid)),
        process=ended.name,
        pid=ended.pid,
        epoch=ended.epoch,
        lived_s=round(time.monotonic() - ended.started_at, 3),
        core_dumped=ended.core_dumped,
        rusage=_shown(ended.usage),
        log=str(log),
        last_lines=tuple(tail(log, _LOG_LINES)),
        kernel=tuple(kernel),
    )


def _reason(ended: Ended, oom: bool, xid: str) -> str:
    if ended.expected:
        return "stopped by pdctl"
    if oom:
        return f"{describe_exit(ended.exit)}: out of memory"
    words = "; ".join(filter(None, (ended.words, xid)))
    return f"{describe_exit(ended.exit)}: {words}" if words else describe_exit(ended.exit)


def _by_others(exit_: Exit) -> str:
    if exit_.signal is None:
        return "itself" if exit_.code is not None else "unknown"
    # Linux does not report the sender of a signal; it is only certain that pdctl did not send it.
    crashes = (4, 6, 7, 8, 11, 31)
    return "itself (a crash)" if exit_.signal in crashes else "another process: pdctl did not send the signal"


def _shown(usage: resource.struct_rusage | None) -> ResourceUse | None:
    if usage is None:
        return None
    return ResourceUse(
        max_rss_bytes=usage.ru_maxrss * 1024,
        user_s=round(usage.ru_utime, 3),
        system_s=round(usage.ru_stime, 3),
        major_faults=usage.ru_majflt,
    )


def was_out_of_memory(pid: int, kernel: list[str]) -> bool:
    """Whether the kernel log says that this process was killed for lack of memory."""
    killed = re.compile(rf"killed process {pid}\b|oom-kill:.*\bpid={pid}\b", re.I)
    return any(killed.search(line) for line in kernel)


def gpu_error(kernel: list[str]) -> str:
    """The last error of a GPU that its driver reports in the kernel log, as text; "" for none."""
    found = [match for line in kernel if (match := _XID.search(line))]
    return f"the driver reports Xid {found[-1][2]} on GPU {found[-1][1]}" if found else ""


def _group_was(group: Path | None) -> bool:
    """Whether the cgroup counted an OOM kill. Each incarnation has a new cgroup, so the count starts at zero."""
    if group is None:
        return False
    with contextlib.suppress(OSError):
        for line in (group / "memory.events").read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count) > 0
    return False


class KernelLog:
    """The relevant kernel messages since the supervisor started; none if the kernel log is not readable."""

    def __init__(self, path: Path = Path("/dev/kmsg")) -> None:
        self._recent: deque[tuple[float, str]] = deque(maxlen=256)
        self._file: int | None = None
        with contextlib.suppress(OSError):
            self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._file, 0, os.SEEK_END)

    def lines(self, window_s: float = _KERNEL_WINDOW_S) -> list[str]:
        """The messages of the last `window_s` seconds; only the newest if there are many."""
        self._read()
        since = time.clock_gettime(time.CLOCK_MONOTONIC) - window_s
        return [text for at, text in self._recent if at >= since][-_KERNEL_LINES:]

    def close(self) -> None:
        """Close the kernel log."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _read(self) -> None:
        while self._file is not None:
            try:
                message = parse_record(os.read(self._file, _MOST_KERNEL_BYTES))
            except BlockingIOError:
                return
            except BrokenPipeError:
                continue  # messages were overwritten before we read them
            except OSError:
                self.close()
                return
            if message is not None and message.at is not None and _TELLING.search(message.text):
                self._recent.append((message.at, message.text))
