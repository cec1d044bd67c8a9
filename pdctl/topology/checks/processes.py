"""Checks the processes and stores of a topology: which entries wait for which, their ports and placeholders."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter

from pdctl.errors import Problem
from pdctl.topology.document import Document
from pdctl.topology.spec import Command, EngineGroup, Topology
from pdctl.topology.toml_lines import Path as KeyPath

# A placeholder for a planned port: {port} or {port:PURPOSE}.
PLACEHOLDER = re.compile(r"\{port(?::([a-z][a-z0-9-]*))?\}")


def order_problems(document: Document, topology: Topology) -> Iterator[Problem]:
    """Names in depends_on, restart_with and store that do not exist, and entries that wait for each other."""
    known = [group.name for group in topology.engines if not group.is_attached]
    known += [process.name for process in topology.processes] + [store.name for store in topology.stores]
    for path, entry in _entries(topology):
        for key, names in (("depends_on", entry.depends_on), ("restart_with", entry.restart_with)):
            for name in names:
                if name not in known or name == entry.name:
                    others = ", ".join(other for other in known if other != entry.name) or "none"
                    message = f"{name!r} is not another group, process or store that pdctl starts"
                    yield document.problem((*path, key), message, f"to choose from: {others}")
        yield from _pattern_problems(document, path, entry.ready)
    stores = [store.name for store in topology.stores]
    for index, group in enumerate(topology.engines):
        if group.store and group.store not in stores:
            hint = f"stores to choose from: {', '.join(stores) or 'none; add [[stores]] with this name and a kind'}"
            yield document.problem(("engines", index, "store"), f"there is no store {group.store!r}", hint)
    yield from _cycle_problems(document, topology)


def _entries(topology: Topology) -> Iterator[tuple[KeyPath, EngineGroup | Command]]:
    for index, group in enumerate(topology.engines):
        yield ("engines", index), group
    for index, process in enumerate(topology.processes):
        yield ("processes", index), process


def _pattern_problems(document: Document, path: KeyPath, ready: str) -> Iterator[Problem]:
    if ready.startswith("log:"):
        try:
            re.compile(ready.removeprefix("log:"))
        except re.error as failure:
            yield document.problem((*path, "ready"), f"not a regular expression: {failure}")


def _cycle_problems(document: Document, topology: Topology) -> Iterator[Problem]:
    # A name that does not exist is reported elsewhere, and so is an entry that needs itself.
    needs = {entry.name: {*entry.depends_on} - {entry.name} for _, entry in _entries(topology)}
    for group in topology.engines:
        needs[group.name] |= {group.store} - {""}
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as failure:
        cycle: list[str] = failure.args[1]
        # The error lists each entry before the one that needs it.
        words = " needs ".join(reversed(cycle))
        path = next(path for path, entry in _entries(topology) if entry.name in cycle)
        yield document.problem((*path, "depends_on"), f"these wait for each other: {words}", "remove one of them")


def process_problems(document: Document, topology: Topology) -> Iterator[Problem]:
    """Ports and probes of processes that cannot work, and engines that name a process without a port."""
    taken = {topology.proxy.port: "the proxy"}
    for index, entry in enumerate(topology.processes):
        path: KeyPath = ("processes", index)
        for _, number in entry.ports:
            if number in taken:
                yield document.problem((*path, "ports"), f"port {number} is already used by {taken[number]}")
            if number:
                taken[number] = entry.name
        yield from _port_problems(document, path, entry)
    by_name = {entry.name: entry for entry in topology.processes}
    for index, group in enumerate(topology.engines):
        path = ("engines", index, "process")
        if group.process and group.process not in by_name:
            hint = f"processes to choose from: {', '.join(by_name) or 'none; add [[processes]] with this name'}"
            yield document.problem(path, f"there is no process {group.process!r}", hint)
        elif group.process and not by_name[group.process].ports:
            message = f"process {group.process!r} has no port"
            yield document.problem(path, message, 'add ports = ["http"] to it, and {port} to its command')


def _port_problems(document: Document, path: KeyPath, entry: Command) -> Iterator[Problem]:
    purposes = [purpose for purpose, _ in entry.ports]
    texts: Sequence[tuple[str, str]] = [("command", word) for word in entry.command]
    texts = [*texts, *(("env", value) for _, value in entry.env)]
    for key, text in texts:
        for found in PLACEHOLDER.finditer(text):
            if not purposes or (found[1] or purposes[0]) not in purposes:
                hint = f"ports of this process: {', '.join(purposes) or 'none'}"
                yield document.problem((*path, key), f"{found[0]} names a port that it does not have", hint)
    # By default, `alive` is what `ready` is: one report is enough.
    for probe, key in {entry.alive: "alive", entry.ready: "ready"}.items():
        if (probe == "tcp" or probe.startswith("http:")) and not purposes:
            hint = 'add ports = ["http"], or set ready = "none"'
            yield document.problem((*path, key), f"{key} = {probe!r} needs a port", hint)
