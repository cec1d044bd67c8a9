"""The logs of all nodes of a cluster, read through this node's agent."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping

from pdctl import console
from pdctl.commands.common import control
from pdctl.commands.inspect.follow import Labelled, by_time
from pdctl.errors import PdctlError

# Of each log, bytes: more of it is on its own node.
_MOST = 2 * 2**20
_POLL_S = 0.5


def show_logs(service: str, name: str | None, follow: bool, after: float, previous: bool) -> None:
    """Print the logs of one process, NAME or NODE/NAME, or of all."""
    logs = _logs(service, name)
    reading = _Reading(service, logs, previous)
    shown = Labelled(logs.values())
    by_time({label: reading.lines(log) for log, label in logs.items()}, shown.show, after)
    for log in reading.cut:
        console.note(f"{log} is cut off after {_MOST} bytes; the rest is on its node")
    if not follow:
        return
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            for log, label in logs.items():
                for line in reading.lines(log):
                    shown.show(label, line)
            time.sleep(_POLL_S)


class _Reading:
    """Reads logs on from where it was. A node that does not answer is said to be silent once, and tried again."""

    def __init__(self, service: str, logs: Mapping[str, str], previous: bool) -> None:
        self._control = control(service)
        self._previous = previous
        self._places = dict.fromkeys(logs, "")
        self._silent: set[str] = set()
        # Those of which there is more than was read at once.
        self.cut: list[str] = []

    def lines(self, log: str) -> Iterator[str]:
        """The lines that are new."""
        left = _MOST
        while left > 0:
            try:
                part = self._control.log_part(log, self._places[log], self._previous, _MOST)
            except PdctlError as failure:
                self._say(log, failure)
                return
            self._silent.discard(log)
            self._places[log] = part.place
            yield from part.text.splitlines()
            if not part.more:
                return
            left -= len(part.text)
        self.cut.append(log)

    def _say(self, log: str, failure: PdctlError) -> None:
        if log not in self._silent:
            console.note(f"{log}: {failure.message}")
        self._silent.add(log)


def _logs(service: str, name: str | None) -> dict[str, str]:
    """NODE/NAME and label of the logs that are meant. Raises PdctlError."""
    found = control(service).log_names()
    for node, reason in found.silent.items():
        console.note(f"node {node} does not answer: {reason}")
    count = Counter(process for names in found.names.values() for process in names)
    logs = {
        f"{node}/{process}": process if count[process] == 1 else f"{node}/{process}"
        for node, names in found.names.items()
        for process in names
    }
    if name is None:
        return logs
    chosen = {log: label for log, label in logs.items() if name in (log, log.partition("/")[2])}
    if not chosen:
        raise PdctlError(f"no process {name!r} in service {service!r}", f"known: {', '.join(logs.values())}")
    return chosen
