"""A process that shares the table of descriptors of a proxy. When the proxy dies its connections stay open here, also
one that it had only just accepted, and are given to the keeper.

It is a copy of the proxy before that has imported anything, and does nothing as long as the proxy lives.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Iterator

from pdctl.net.keeping import KEEP, TAKEOVER_ENV, cookie_of, send
from pdctl.wire import LISTEN_FD_ENV

_CLONE_FILES = 0x400  # linux/sched.h
_SYS_CLONE3 = 435  # the same on all architectures
# struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, and others.
_CLONE_ARGS = struct.Struct("11Q")
# How long the keeper may take to read, seconds.
_TELL_S = 2.0
_NAME = b"proxy-sharer"
_PR_SET_NAME = 15  # linux/prctl.h

# PyDLL keeps the interpreter's lock: no other code runs between the call and its return in the new process.
_libc = ctypes.PyDLL(None, use_errno=True)


def share_descriptors() -> None:
    """Start that process, if connections are to outlive this one. The caller has one thread."""
    told = os.environ.get(TAKEOVER_ENV)
    if not told:
        return
    keeper, listener = int(told.partition(",")[0]), int(os.environ[LISTEN_FD_ENV])
    # Both processes have it: it stays open until the proxy's end.
    proxy = os.pidfd_open(os.getpid())
    pid = _clone()
    if pid < 0:
        reason = os.strerror(ctypes.get_errno())
        sys.stderr.write(f"connections that have just been accepted are lost if this proxy dies: clone3: {reason}\n")
    if pid == 0:
        try:
            _wait_and_tell(proxy, keeper, listener)
        finally:
            os._exit(0)


def _clone() -> int:
    """The pid of a new process with the same table of descriptors; 0 in that process; -1 if the kernel refuses."""
    fields = [0] * 11
    fields[0], fields[4] = _CLONE_FILES, int(signal.SIGCHLD)
    arguments = _CLONE_ARGS.pack(*fields)
    return int(_libc.syscall(_SYS_CLONE3, arguments, ctypes.c_size_t(len(arguments))))


def _wait_and_tell(proxy: int, keeper: int, listener: int) -> None:
    """Wait for the end of the proxy; then give its clients' connections to the keeper, which knows most of them."""
    # The proxy is who is asked to end.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    _libc.prctl(_PR_SET_NAME, _NAME, 0, 0, 0)
    select.select([proxy], [], [])
    channel = socket.socket(fileno=keeper)
    for descriptor in _clients(listener):
        try:
            _tell(channel, descriptor)
        except OSError:
            return  # the supervisor is gone, or reads nothing: nobody goes on with them


def _clients(listener: int) -> Iterator[int]:
    """The connections that came to this listening socket."""
    port = _local_port(listener)
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names are all that is needed
        with contextlib.suppress(OSError):  # no socket, or one without a port
            if int(name) != listener and _local_port(int(name)) == port and not _listens(int(name)):
                yield int(name)


def _local_port(descriptor: int) -> int:
    """Raises OSError for what is not a socket with a port."""
    borrowed = socket.socket(fileno=descriptor)
    try:
        name = borrowed.getsockname()
        return int(name[1]) if borrowed.family in (socket.AF_INET, socket.AF_INET6) else 0
    finally:
        borrowed.detach()


def _listens(descriptor: int) -> bool:
    borrowed = socket.socket(fileno=descriptor)
    try:
        return bool(borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    finally:
        borrowed.detach()


def _tell(channel: socket.socket, descriptor: int) -> None:
    """Raises OSError."""
    cookie = cookie_of(descriptor).to_bytes(8, "little")
    while True:
        try:
            return send(channel, KEEP, cookie, [descriptor])
        except BlockingIOError:
            _, is_free, _ = select.select([], [channel], [], _TELL_S)
            if not is_free:
                raise
