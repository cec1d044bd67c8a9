"""The core's outgoing messages to the front."""

from __future__ import annotations

import queue
import threading

import msgspec
import zmq

from pdctl.engine.ipc import pipes
from pdctl.engine.ipc.messages import FromCore
from pdctl.engine.lifeline import vital


class Outbox:
    """Messages to the front. Any thread may put; one thread sends."""

    def __init__(self, address: str) -> None:
        # Its own: only a context without other sockets can be waited for at the end.
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._queue: queue.SimpleQueue[FromCore | None] = queue.SimpleQueue()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.set_hwm(pipes.HIGH_WATER)
        self._socket.connect(address)
        self._thread = threading.Thread(target=vital(self._send), name="outbox", daemon=True)
        self._thread.start()

    def put(self, message: FromCore) -> None:
        """Queue a message."""
        self._queue.put(message)

    def close(self) -> None:
        """Send the queued messages, then stop. Afterwards they have left this process, unless nobody takes them."""
        self._queue.put(None)
        self._thread.join(timeout=2)
        self._socket.close(linger=500)
        self._context.term()

    def _send(self) -> None:
        encode = msgspec.msgpack.Encoder().encode
        while (message := self._queue.get()) is not None:
            self._socket.send(encode(message))
