"""Spans of a process: exported with the right times, and not waited for at the end if nobody takes them."""

from __future__ import annotations

import socket
import threading
import time

from pdctl.net.tracing import Spans, traces_url
from tests.collector import collector


def test_times_are_those_of_the_wall() -> None:
    with collector() as found:
        spans = Spans(found.endpoint + "/", "s", "test")
        began, now = time.monotonic() - 100, time.time()
        span = spans.received("root", {}, began)
        span.child("part", began + 1, began + 3, {"n": 1})
        span.event("moment", began + 2)
        span.end()
        spans.close()
    part, root = sorted(found.spans, key=lambda span: span.name)
    assert abs(root.began - (now - 100)) < 5
    assert abs(part.began - root.began - 1) < 0.1
    assert abs(part.ended - part.began - 2) < 0.1
    assert (part.parent, root.parent, root.events) == (root.id, "", ("moment",))


def test_a_collector_that_hangs_is_not_waited_for() -> None:
    """Four batches of spans are left at the end. Each would wait for the limit of an export."""
    asked: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def take() -> None:
            while True:
                try:
                    asked.append(listener.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=take)
        thread.start()
        spans = Spans(f"http://127.0.0.1:{listener.getsockname()[1]}", "s", "test")
        for _ in range(2000):
            spans.received("root", {}).end()
        spans.close()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    for connection in asked:
        connection.close()
    assert 1 <= len(asked) <= 2


def test_the_address_of_traces() -> None:
    assert traces_url("http://c:4318") == traces_url("http://c:4318/") == "http://c:4318/v1/traces"
