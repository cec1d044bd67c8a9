"""systemd's notification protocol (sd_notify(3)): ready, stopping, alive. Does nothing outside systemd."""

from __future__ import annotations

import contextlib
import os
import socket


class Notifier:
    """Sends to $NOTIFY_SOCKET. `watchdog_s`: the interval at which systemd expects WATCHDOG=1, or 0."""

    def __init__(self) -> None:
        # Children must not notify systemd in the supervisor's name.
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        meant = os.environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        period = os.environ.pop("WATCHDOG_USEC", "0")
        self.watchdog_s = int(period) / 1e6 / 2 if self._address and meant and period.isdecimal() else 0.0

    def say(self, *lines: str) -> None:
        """Send lines such as READY=1, STATUS=..., WATCHDOG=1."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.setblocking(False)
            out.sendto("\n".join(lines).encode(), address)
