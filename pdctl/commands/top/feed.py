"""Reads what is shown, in threads of their own: an engine or a supervisor that does not answer must not delay a key."""

from __future__ import annotations

import contextlib
import http.client
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from pdctl.commands.top.rates import Rates, Window, counts_in
from pdctl.commands.top.snapshot import Sample, Snapshot, merged, sample_of
from pdctl.control_api import ControlClient, Event, MeasuredStatus, ServiceStatus
from pdctl.control_api.client import event_of
from pdctl.errors import NotRunning, PdctlError
from pdctl.supervisor.rundir.journal_reader import Entry, JournalReader

# States and events are read this often: a crash is to be seen within two seconds.
_STATES_S = 0.5
_MEASURED_S = 1.0
# One scrape of the proxy takes this long at most, seconds.
_SCRAPE_S = 2.0
_LARGEST_SCRAPE = 4 * 2**20
_MOST_EVENTS = 200
_MOST_SAMPLES = 240


class Feed:
    """Two threads: one for states and events, one for measurements; in a cluster, a third for events. `snapshot` is
    what they know by now."""

    def __init__(self, run_dir: Path, log_dir: Path, first: ServiceStatus) -> None:
        self._control = ControlClient(run_dir)
        self._journal = JournalReader(log_dir, "")
        # In a cluster, the agent tells the events of all nodes.
        self._is_cluster, self._cursor = bool(first.nodes), ""
        self._states = first
        self._trouble, self._is_running = "", True
        self._measured: MeasuredStatus | None = None
        self._events: deque[Event] = deque(maxlen=_MOST_EVENTS)
        self._samples: deque[Sample] = deque(maxlen=_MOST_SAMPLES)
        self._window = Window()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._version = 0

    @property
    def version(self) -> int:
        """Changes whenever the snapshot does."""
        return self._version

    def snapshot(self) -> Snapshot:
        """What is known."""
        with self._lock:
            return Snapshot(
                merged(self._states, self._measured), self._trouble, self._is_running,
                tuple(reversed(self._events)), tuple(self._samples),
            )  # fmt: skip

    def start(self) -> None:
        """Begin to read. The threads end with the process: a call that hangs must not keep it."""
        works = [(self.read_states, _STATES_S), (self.measure, _MEASURED_S)]
        if self._is_cluster:
            works.append((self.follow_events, _MEASURED_S))
        for work, every_s in works:
            threading.Thread(target=self._repeat, args=(work, every_s), daemon=True).start()

    def stop(self) -> None:
        """Read nothing more."""
        self._over.set()

    def _repeat(self, work: Callable[[], None], every_s: float) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            work()
            self._over.wait(max(0.0, every_s - (time.monotonic() - began)))

    def read_states(self) -> None:
        """Read new events and the states of all processes, once."""
        found = [event_of(entry.cursor, entry.line) for entry in self._new_entries()]
        try:
            states, trouble, is_running = self._control.status(measurements=False), "", True
        except NotRunning as failure:
            states, trouble, is_running = self._states, _told(failure), False
        except PdctlError as failure:
            states, trouble, is_running = self._states, _told(failure), True
        with self._lock:
            self._events.extend(found)
            changed = bool(found) or (states, trouble) != (self._states, self._trouble)
            self._states, self._trouble, self._is_running = states, trouble, is_running
            self._version += changed

    def _new_entries(self) -> list[Entry]:
        """Everything new in the journal, the newest at most."""
        found: deque[Entry] = deque(maxlen=_MOST_EVENTS)
        if self._is_cluster:
            return []
        # Such as a folder that was removed: there is nothing to show until it is back.
        with contextlib.suppress(OSError):
            while entries := self._journal.read():
                found.extend(entries)
        return list(found)

    def follow_events(self) -> None:
        """Read the events of all nodes, until the agent ends them."""
        with contextlib.suppress(PdctlError):
            for event in self._control.events(self._cursor):
                self._cursor = event.cursor
                with self._lock:
                    self._events.append(msgspec.structs.replace(event, process=f"{event.node}/{event.process}"))
                    self._version += 1

    def measure(self) -> None:
        """Measure all processes and scrape the proxy, once."""
        try:
            status = self._control.status()
        except PdctlError:
            return  # the other thread says so
        rates = self._scraped(status)
        with self._lock:
            self._measured = status
            self._samples.append(sample_of(status, rates))
            self._version += 1

    def _scraped(self, status: MeasuredStatus) -> Rates | None:
        try:
            text = scrape(status.proxy_url, status.tls_cert)
            return self._window.rates(time.monotonic(), counts_in(text))
        except (OSError, http.client.HTTPException, ValueError):
            return None


def scrape(url: str, certificate: str) -> str:
    """The proxy's metrics as text. `certificate`: its own, or empty. Raises OSError, HTTPException."""
    parts = urlsplit(url)
    assert parts.hostname, url
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        tls = ssl.create_default_context(cafile=certificate or None)
        tls.check_hostname = not certificate  # this service's own, by its file
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=_SCRAPE_S, context=tls)
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=_SCRAPE_S)
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        if answer.status != 200:
            raise http.client.HTTPException(f"/metrics answered {answer.status}")
        return answer.read(_LARGEST_SCRAPE).decode()
    finally:
        connection.close()


def _told(failure: PdctlError) -> str:
    return failure.message + (f"; {failure.hint}" if failure.hint else "")
