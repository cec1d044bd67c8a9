"""Checks each key of a file separately: it must be known, and its value must have the right type and range."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import cast

from pdctl.adapters import HandShake, can_launch, dialect, kinds, launcher
from pdctl.errors import Problem
from pdctl.stores import store_kinds, store_launcher
from pdctl.topology.document import Document, Table
from pdctl.topology.schema import ATTACHED, ENGINE, EVERY_KIND, EVERY_STORE, LISTS, STORE, TABLES, Key
from pdctl.topology.toml_lines import Path as KeyPath


def key_problems(document: Document) -> Iterator[Problem]:
    """Yield every problem of a single key or table, and missing tables."""
    if not document.data:
        yield Problem(0, "", "the file is empty", "create a topology for this machine with: pdctl init")
        return
    known = [*TABLES, *LISTS]
    for name, table in document.data.items():
        if name not in known:
            yield document.problem((name,), f"unknown table or key {name!r}", _did_you_mean(name, known))
        elif name in LISTS:
            yield from _list_problems(document, name, table)
        elif not isinstance(table, dict):
            yield document.problem((name,), f"must be a table: [{name}]")
        else:
            yield from _table_problems(document, (name,), table, TABLES[name])
    if "service" not in document.data:
        yield Problem(
            0, "service", "missing table [service]", 'add it with at least a model: model = "sample:gemma-3-270m"'
        )
    if "engines" not in document.data and not _accepts_nodes(document):
        yield Problem(0, "engines", "no engines", "add [[engines]] with a name and a role")


def _list_problems(document: Document, name: str, tables: object) -> Iterator[Problem]:
    if not isinstance(tables, list) or not all(isinstance(entry, dict) for entry in tables):
        yield document.problem((name,), f"must be a list of tables: [[{name}]]")
        return
    if name == "engines" and not tables and not _accepts_nodes(document):
        yield document.problem(("engines",), "no engines", "add [[engines]] with a name and a role")
    for index, entry in enumerate(cast(list[Table], tables)):
        yield from _table_problems(document, (name, index), entry, LISTS[name])
        if name == "engines":
            yield from _attached_problems(document, index, entry)
        elif name == "stores":
            yield from _store_problems(document, index, entry)


def _accepts_nodes(document: Document) -> bool:
    """Whether engines may register themselves: then the file needs none."""
    proxy = document.data.get("proxy")
    return isinstance(proxy, dict) and proxy.get("accept_nodes") is True


def _store_problems(document: Document, index: int, entry: Table) -> Iterator[Problem]:
    """Keys that have no effect on a store of this kind."""
    kind = entry.get("kind")
    if not isinstance(kind, str) or kind not in store_kinds():
        return
    settings = store_launcher(kind).settings
    for name in entry:
        if name in STORE and name not in EVERY_STORE | settings:
            message = f"{name} has no effect on stores of kind {kind!r}"
            hint = f"remove it; keys of this kind: {', '.join(sorted(settings))}"
            yield document.problem(("stores", index, name), message, hint)


def _attached_problems(document: Document, index: int, entry: Table) -> Iterator[Problem]:
    kind = entry.get("kind", "builtin")
    if "url" in entry and "process" in entry:
        hint = "url is the address of an engine elsewhere; process names an entry of [[processes]]"
        yield document.problem(("engines", index, "process"), "url and process are both set", hint)
    if is_attached := "url" in entry or "process" in entry:
        for name in entry:
            if name in ENGINE and name not in ATTACHED:
                hint = "remove it: pdctl does not start this engine, so it cannot set this"
                yield document.problem(("engines", index, name), f"{name} has no effect on an attached engine", hint)
        if "bootstrap_port" in entry and not _meets_decode(entry, str(kind)):
            hint = "remove it: only a prefill engine of a kind such as sglang has a bootstrap port"
            message = "bootstrap_port has no effect on this engine"
            yield document.problem(("engines", index, "bootstrap_port"), message, hint)
    elif "secret_file" in entry:
        hint = "pdctl generates the secret of the engines that it starts"
        yield document.problem(("engines", index, "secret_file"), "secret_file is for attached engines", hint)
    if kind in kinds() and not is_attached:
        yield from _kind_problems(document, index, entry, str(kind))
    if kind in kinds():
        yield from _connector_problems(document, index, entry, str(kind), is_attached)


def _meets_decode(entry: Table, kind: str) -> bool:
    """Whether decode engines connect to this one when both get a request at once."""
    at_once = kind in kinds() and dialect(kind).hand_shake is HandShake.CONCURRENT
    return at_once and entry.get("role") == "prefill"


def _kind_problems(document: Document, index: int, entry: Table, kind: str) -> Iterator[Problem]:
    """Keys of an engine that pdctl starts, but that have no effect on its kind."""
    if not can_launch(kind):
        hint = 'start the engine yourself and set its address: url = "http://HOST:PORT"'
        yield document.problem(("engines", index, "kind"), f"pdctl cannot start engines of kind {kind!r}", hint)
        return
    settings = launcher(kind).settings
    for name in entry:
        if name in ENGINE and name not in EVERY_KIND | settings | {"secret_file"}:
            hint = f"remove it; keys of this kind: {', '.join(sorted(settings)) or 'none'}"
            message = f"{name} has no effect on engines of kind {kind!r}"
            yield document.problem(("engines", index, name), message, hint)


def _connector_problems(
    document: Document, index: int, entry: Table, kind: str, is_attached: bool
) -> Iterator[Problem]:
    connectors = launcher(kind).connectors if can_launch(kind) else ()
    connector = entry.get("connector")
    if connectors and isinstance(connector, str) and connector not in connectors:
        message = f"must be one of: {', '.join(connectors)}; it is {connector!r}"
        yield document.problem(("engines", index, "connector"), message)
    if is_attached and not connectors and connector is not None:
        message = f"connector has no effect on engines of kind {kind!r}"
        yield document.problem(("engines", index, "connector"), message, "remove it")


def _table_problems(document: Document, path: KeyPath, table: Table, keys: dict[str, Key]) -> Iterator[Problem]:
    for name, value in table.items():
        if name not in keys:
            yield document.problem((*path, name), f"unknown key {name!r}", _did_you_mean(name, list(keys)))
        elif wrong := keys[name].check(value):
            yield document.problem((*path, name), f"{wrong}; it is {_shown(value)}")
    for name, key in keys.items():
        if key.required and name not in table:
            yield document.problem(path, f"missing key {name!r}")


def _did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
