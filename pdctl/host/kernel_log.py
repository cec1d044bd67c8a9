"""The kernel's messages: from /dev/kmsg, or from a text that `dmesg` or `journalctl -k` wrote."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

_MOST_BYTES = 8192
# Kernel rings hold some thousands of messages; a text may be long.
_MOST_LINES = 50_000
_MOST_TEXT = 16 * 2**20
# `[ 1234.567890] text`, as dmesg writes it; journalctl has its own head before that.
_DMESG = re.compile(r"\[\s*(\d+\.\d+)\]\s?(.*)")


@dataclass(frozen=True, slots=True)
class Message:
    """`at`: seconds since boot on the monotonic clock; None where the text does not say."""

    at: float | None
    text: str


@dataclass(frozen=True, slots=True)
class KernelLog:
    """`messages`, oldest first; `unread`: why there are none, "" where the log could be read."""

    source: str
    messages: tuple[Message, ...] = ()
    unread: str = ""


def read_kernel_log(path: Path = Path("/dev/kmsg")) -> KernelLog:
    """All that is kept there now. Never waits, never raises."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as failure:
        return KernelLog(str(path), unread=failure.strerror or "cannot be opened")
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISCHR(mode):
            return KernelLog(str(path), tuple(_records(descriptor)))
        if not stat.S_ISREG(mode):
            return KernelLog(str(path), unread="neither a device nor a file")
        os.lseek(descriptor, max(0, os.fstat(descriptor).st_size - _MOST_TEXT), os.SEEK_SET)
        text = os.read(descriptor, _MOST_TEXT).decode(errors="replace")
        return KernelLog(str(path), tuple(_line(line) for line in text.splitlines()[-_MOST_LINES:]))
    except OSError as failure:
        return KernelLog(str(path), unread=failure.strerror or "cannot be read")
    finally:
        os.close(descriptor)


def parse_record(record: bytes) -> Message | None:
    """One read of /dev/kmsg: `priority,sequence,microseconds,flags;text` (Documentation/ABI/testing/dev-kmsg)."""
    head, _, text = record.decode(errors="replace").partition(";")
    fields = head.split(",")
    if len(fields) < 3 or not fields[2].isdecimal() or not text:
        return None
    return Message(int(fields[2]) / 1e6, text.splitlines()[0])


def _records(descriptor: int) -> list[Message]:
    found: list[Message] = []
    for _ in range(_MOST_LINES):
        try:
            record = os.read(descriptor, _MOST_BYTES)
        except BlockingIOError:
            break
        except BrokenPipeError:
            continue  # messages were overwritten before we read them
        if not record:
            break  # no kernel's log: a container may have /dev/null in its place
        message = parse_record(record)
        if message is not None:
            found.append(message)
    return found


def _line(line: str) -> Message:
    found = _DMESG.search(line)
    return Message(float(found[1]), found[2]) if found else Message(None, line)
