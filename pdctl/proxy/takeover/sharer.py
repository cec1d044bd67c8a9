"""A process that shares the table of descriptors of a proxy. When the proxy dies its connections stay open here, also
one that it had only just accepted, and are given to the keeper.

It is a copy of the proxy before that has imported anything, and does nothing as long as the proxy lives.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import select
import signal
import socket
import struct
import sys
from collections.abc import Iterator

from pdctl.net.keeping import KEEP, TAKEOVER_ENV, cookie_of, send
from pdctl.proxy.takeover.kernel import counts_of
from pdctl.wire import LISTEN_FD_ENV

_CLONE_FILES = 0x400  # linux/sched.h
_SYS_CLONE3 = 435  # the same on all architectures
_SYS_CLONE = {"x86_64": 56, "aarch64": 220}
# struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, and others.
_CLONE_ARGS = struct.Struct("11Q")
# How long the keeper may take to read, milliseconds.
_TELL_MS = 2000
_NAME = b"proxy-sharer"
_PR_SET_NAME = 15  # linux/prctl.h

# PyDLL keeps the interpreter's lock: no other code runs between the call and its return in the new process.
_libc = ctypes.PyDLL(None, use_errno=True)


def share_descriptors() -> None:
    """Start that process, if connections are to outlive this one."""
    told = os.environ.get(TAKEOVER_ENV)
    if not told:
        return
    reason = "" if _is_alone() else "this process has threads already"
    # Descriptors of its own: the proxy may close its channel, and then the number would become another's.
    keeper, port = os.dup(int(told.partition(",")[0])), _local_port(int(os.environ[LISTEN_FD_ENV]))
    proxy = os.pidfd_open(os.getpid())
    pid = -1 if reason else _clone()
    if pid < 0:
        reason = reason or f"clone: {os.strerror(ctypes.get_errno())}"
        sys.stderr.write(f"connections that have just been accepted are lost if this proxy dies: {reason}\n")
        os.close(keeper)
        os.close(proxy)
    if pid == 0:
        try:
            _wait_and_tell(proxy, keeper, port)
        finally:
            os._exit(0)


def _is_alone() -> bool:
    """Whether this process has one thread. A copy of one with several may wait for locks that nobody has."""
    return len(os.listdir("/proc/self/task")) == 1  # noqa: PTH208 - names are enough


def _clone() -> int:
    """The pid of a new process with the same table of descriptors; 0 in that process; -1 if the kernel refuses."""
    fields = [0] * 11
    fields[0], fields[4] = _CLONE_FILES, int(signal.SIGCHLD)
    arguments = _CLONE_ARGS.pack(*fields)
    pid = int(_libc.syscall(_SYS_CLONE3, arguments, ctypes.c_size_t(len(arguments))))
    number = _SYS_CLONE.get(platform.machine())
    if pid < 0 and number is not None:
        # Containers often refuse clone3, whose flags they cannot see, and allow clone.
        flags, nothing = ctypes.c_ulong(_CLONE_FILES | signal.SIGCHLD), ctypes.c_ulong(0)
        pid = int(_libc.syscall(ctypes.c_long(number), flags, nothing, nothing, nothing, nothing))
    return pid


def _wait_and_tell(proxy: int, keeper: int, port: int) -> None:
    """Wait for the end of the proxy; then give its newest connections to the keeper, which has the others."""
    # The proxy is who is asked to end.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    _libc.prctl(_PR_SET_NAME, _NAME, 0, 0, 0)
    _wait(proxy, select.POLLIN, None)
    channel = socket.socket(fileno=keeper)
    for descriptor in _new_clients(port):
        try:
            _tell(channel, descriptor)
        except OSError:
            return  # the supervisor is gone, or reads nothing: nobody goes on with them


def _new_clients(port: int) -> Iterator[int]:
    """The connections that came to this port, and of which nothing was read. Nobody can go on with others, unless the
    keeper has them already."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names are enough
        with contextlib.suppress(OSError):  # no socket, or one without a port or counts
            if _local_port(int(name)) == port and _is_new(int(name)):
                yield int(name)


def _local_port(descriptor: int) -> int:
    """0 for a socket that has none. Raises OSError for what is not a socket."""
    borrowed = socket.socket(fileno=descriptor)
    try:
        return int(borrowed.getsockname()[1]) if borrowed.family in (socket.AF_INET, socket.AF_INET6) else 0
    finally:
        borrowed.detach()


def _is_new(descriptor: int) -> bool:
    """Raises OSError for a socket that listens."""
    borrowed = socket.socket(fileno=descriptor)
    try:
        counts = counts_of(borrowed)
        return counts.open and not counts.read and not counts.taken
    finally:
        borrowed.detach()


def _tell(channel: socket.socket, descriptor: int) -> None:
    """Raises OSError."""
    cookie = cookie_of(descriptor).to_bytes(8, "little")
    while True:
        try:
            return send(channel, KEEP, cookie, [descriptor])
        except BlockingIOError:
            if not _wait(channel.fileno(), select.POLLOUT, _TELL_MS):
                raise


def _wait(descriptor: int, what: int, within_ms: int | None) -> bool:
    """Whether it came within that time. Numbers of descriptors may be large: `select` takes only small ones."""
    poll = select.poll()
    poll.register(descriptor, what)
    return bool(poll.poll(within_ms))
