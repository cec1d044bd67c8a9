"""Kernel messages from /dev/kmsg, or from a text file with the output of `dmesg` or `journalctl -k`."""

from __future__ import annotations

import os
import re
import stat
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

_MOST_BYTES = 8192
# The kernel's ring buffer holds some thousands of messages; a text file may be longer.
_MOST_LINES = 50_000
_MOST_TEXT = 16 * 2**20
# `[ 1234.567890] text`, as dmesg writes it; journalctl puts its own prefix before it.
_DMESG = re.compile(r"\[\s*(\d+\.\d+)\]\s?(.*)")
# Wall-clock formats: `dmesg -T`, `dmesg --time-format iso`, `journalctl -o short-iso`, `journalctl -k`.
_CTIME = re.compile(r"\[(\w{3} \w{3} [ \d]\d \d\d:\d\d:\d\d \d{4})\]\s?(.*)")
_ISO = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)[.,]?\d*([+-]\d\d):?(\d\d)\s+(?:\S+ kernel: )?(.*)")
_SHORT = re.compile(r"(\w{3} [ \d]\d \d\d:\d\d:\d\d) \S+ kernel: (.*)")


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `at`: seconds since boot on the monotonic clock; None if unknown."""

    at: float | None
    text: str


@dataclass(frozen=True, slots=True)
class KernelLog:
    """A kernel log. `messages`: oldest first; `taken_at`: when the log was read or saved, on the clock of its messages;
    `unread`: why it could not be read, else ""."""

    source: str
    messages: tuple[Message, ...] = ()
    unread: str = ""
    taken_at: float = 0.0


def read_kernel_log(path: Path = Path("/dev/kmsg")) -> KernelLog:
    """Read all messages. Never blocks and never raises."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as failure:
        return KernelLog(str(path), unread=failure.strerror or "cannot be opened")
    try:
        found = os.fstat(descriptor)
        if stat.S_ISCHR(found.st_mode):
            taken_at = time.clock_gettime(time.CLOCK_MONOTONIC)
            return KernelLog(str(path), tuple(_records(descriptor)), taken_at=taken_at)
        if not stat.S_ISREG(found.st_mode):
            return KernelLog(str(path), unread="neither a device nor a file")
        os.lseek(descriptor, max(0, found.st_size - _MOST_TEXT), os.SEEK_SET)
        text = os.read(descriptor, _MOST_TEXT).decode(errors="replace")
        lines = tuple(_line(line) for line in text.splitlines()[-_MOST_LINES:])
        return KernelLog(str(path), lines, taken_at=_taken_at(lines, found.st_mtime))
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
            continue  # messages were overwritten before they were read
        if not record:
            break  # not a kernel log: a container may have /dev/null in its place
        message = parse_record(record)
        if message is not None:
            found.append(message)
    return found


def _line(line: str) -> Message:
    """Parse a line of text. A date is converted to seconds since this machine's boot, even in another machine's log."""
    if found := _DMESG.search(line):
        return Message(float(found[1]), found[2])
    try:
        if found := _CTIME.search(line):
            return Message(_on_our_clock(datetime.strptime(found[1], "%a %b %d %H:%M:%S %Y")), found[2])
        if found := _ISO.match(line):
            return Message(_on_our_clock(datetime.fromisoformat(f"{found[1]}{found[2]}:{found[3]}")), found[4])
        if found := _SHORT.match(line):
            return Message(_on_our_clock(_without_year(found[1])), found[2])
    except ValueError:
        pass
    return Message(None, line)


def _without_year(text: str) -> datetime:
    """Parse a date without a year as the most recent such day, allowing for one day of clock difference."""
    now = datetime.now()
    found = datetime.strptime(f"{now.year} {text}", "%Y %b %d %H:%M:%S")
    return found.replace(year=now.year - 1) if found > now + timedelta(days=1) else found


def _on_our_clock(when: datetime) -> float:
    return time.clock_gettime(time.CLOCK_MONOTONIC) - (time.time() - when.timestamp())


def _taken_at(messages: tuple[Message, ...], written: float) -> float:
    """When the text was saved. A log of another boot has only the clock of its messages, so its newest one is used."""
    now = time.clock_gettime(time.CLOCK_MONOTONIC)
    last = max((message.at for message in messages if message.at is not None), default=now)
    ours = now - (time.time() - written)
    return ours if ours >= last else last
