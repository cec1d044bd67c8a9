"""systemd's notification protocol (sd_notify(3)): ready, stopping, alive. Nothing where nobody listens."""

from __future__ import annotations

import contextlib
import os
import socket


class Notifier:
    """Sends to $NOTIFY_SOCKET. `watchdog_s`: how often systemd wants to hear that we live, or 0."""

    def __init__(self) -> None:
        # Children must not speak in our name.
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        meant = os.environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        period = os.environ.pop("WATCHDOG_USEC", "0")
        self.watchdog_s = int(period) / 1e6 / 2 if self._address and meant and period.isdecimal() else 0.0

    def say(self, *lines: str) -> None:
        """Such as READY=1, STATUS=..., WATCHDOG=1."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.setblocking(False)
            out.sendto("\n".join(lines).encode(), address)
