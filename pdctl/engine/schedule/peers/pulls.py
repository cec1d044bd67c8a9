"""Sequences whose blocks are being written to by other threads, so that these blocks go to nobody else meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Pulls:
    """The number of running pulls of each request. They start in other threads than the one that handles their ends, so
    the next pull of a sequence may start before the end of the last one is known. `running`: by request."""

    def __init__(self) -> None:
        self.running: dict[str, int] = {}
        self._doomed: set[str] = set()
        self._lock = threading.Lock()

    def start(self, request_id: str, may: Callable[[], bool]) -> bool:
        """A pull starts, if it `may`, which is asked when no abort can come between."""
        with self._lock:
            if not may():
                return False
            self.running[request_id] = self.running.get(request_id, 0) + 1
        return True

    def end(self, request_id: str) -> int:
        """A pull is over. Returns how many of this request are left."""
        with self._lock:
            left = self.running.pop(request_id) - 1
            if left:
                self.running[request_id] = left
        return left

    def abort(self, request_id: str, forget: Callable[[], None]) -> None:
        """The request is aborted: forget it now, or when its pulls have ended."""
        with self._lock:
            if request_id in self.running:
                self._doomed.add(request_id)
            else:
                forget()

    def is_doomed(self, request_id: str) -> bool:
        """Whether the request ends with its pulls."""
        return request_id in self._doomed

    def settle(self, request_id: str) -> bool:
        """Whether the request was doomed; it is not any more."""
        doomed = request_id in self._doomed
        self._doomed.discard(request_id)
        return doomed
