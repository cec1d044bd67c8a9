"""The core's message queue: first in, first out, for several writers and readers."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Message = TypeVar("Message")


class Inbox(Generic[Message]):
    """A queue without its own limit: the front limits what it sends."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._arrived = threading.Condition()

    @property
    def is_empty(self) -> bool:
        """Whether no message waits."""
        return not self._messages

    def put(self, message: Message) -> None:
        """Add a message. Never blocks."""
        with self._arrived:
            self._messages.append(message)
            self._arrived.notify()

    def get(self, timeout: float = 0.0) -> Message:
        """The oldest message. Raises queue.Empty if none arrives within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with self._arrived:
            while not self._messages:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise queue.Empty
                self._arrived.wait(left)
            return self._messages.popleft()

    def take_if(self, is_wanted: Callable[[Message], bool]) -> Message | None:
        """The oldest message if `is_wanted`, else None. Messages are never taken out of order."""
        with self._arrived:
            if self._messages and is_wanted(self._messages[0]):
                return self._messages.popleft()
        return None
