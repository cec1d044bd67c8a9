"""Checks the consistency of a topology's keys with each other, and the files that it names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pdctl.adapters import Ability, control, launcher
from pdctl.errors import PdctlError, Problem
from pdctl.topology.checks.cluster import cluster_problems
from pdctl.topology.checks.processes import order_problems, process_problems
from pdctl.topology.document import Document
from pdctl.topology.spec import Device, EngineGroup, Proxy, Role, Topology
from pdctl.transports import TRANSPORTS
from pdctl.user_files import read_api_keys, tls_problem


def topology_problems(document: Document, topology: Topology) -> Iterator[Problem]:
    """Yield every problem that does not depend on this machine's hardware or packages."""
    yield from _name_problems(document, topology)
    for index, group in enumerate(topology.engines):
        if group.gpus and group.device is Device.CPU:
            yield document.problem(("engines", index, "gpus"), "gpus is set on a CPU engine", 'set device = "cuda"')
        if group.attention not in ("auto", "gather") and group.device is Device.CPU:
            message = f"attention = {group.attention!r} needs a GPU"
            yield document.problem(("engines", index, "attention"), message, 'set device = "cuda", or remove it')
        if group.enforce_eager and group.device is Device.CPU:
            message = "enforce_eager has no effect on a CPU engine: only GPUs have CUDA graphs"
            yield document.problem(("engines", index, "enforce_eager"), message, "remove it")
        yield from _kv_size_problems(document, index, group)
    yield from _elastic_problems(document, topology)
    yield from order_problems(document, topology)
    yield from process_problems(document, topology)
    yield from cluster_problems(document, topology)
    yield from _transfer_problems(document, topology)
    yield from _service_problems(document, topology)
    roles = {group.role for group in topology.engines}
    yield from _proxy_problems(document, topology.proxy)
    if len({group.device for group in topology.engines if not group.is_attached}) > 1 and roles != {Role.HYBRID}:
        hint = "KV is float32 on the CPU and bfloat16 on GPUs: use the same device for engines that exchange KV"
        yield document.problem(("engines",), "CPU and CUDA engines cannot hand KV to each other", hint)
    if topology.proxy.accept_nodes:
        return  # the other role may register itself
    if roles == {Role.PREFILL}:
        yield document.problem(("engines",), "prefill without decode", 'add an engine with role = "decode" or "hybrid"')
    if roles == {Role.DECODE}:
        yield document.problem(
            ("engines",), "decode without prefill", 'add an engine with role = "prefill" or "hybrid"'
        )


def _elastic_problems(document: Document, topology: Topology) -> Iterator[Problem]:
    elastic = topology.elastic
    if elastic.mode == "off":
        return
    able = [
        group for group in topology.engines if not group.is_attached and Ability.ROLE in control(group.kind).abilities
    ]
    count = sum(group.replicas for group in able)
    if not able:
        message = "no engine of this service can change its role while it runs"
        yield document.problem(("elastic", "mode"), message, 'remove [elastic], or use engines of kind "builtin"')
    elif max(elastic.min_prefill, elastic.min_decode) > count:
        key = "min_prefill" if elastic.min_prefill > count else "min_decode"
        message = f"only {count} engines can change their role"
        yield document.problem(("elastic", key), message, f"set {key} = {count} or less")


def _kv_size_problems(document: Document, index: int, group: EngineGroup) -> Iterator[Problem]:
    path = ("engines", index, "gpu_memory_utilization")
    if group.kind != "builtin" or "gpu_memory_utilization" not in group.given:
        return
    if group.device is Device.CPU:
        yield document.problem(path, "gpu_memory_utilization has no effect on the CPU", "set kv_cache_gb")
    elif "kv_cache_gb" in group.given:
        yield document.problem(path, "kv_cache_gb sets the size of the KV already", "remove one of the two")


def _name_problems(document: Document, topology: Topology) -> Iterator[Problem]:
    """Two entries with the same name."""
    observed: dict[str, str] = {"proxy": "the proxy", "supervisor": "the supervisor"}
    observed |= {f"proxy-{number}": "the proxy" for number in range(topology.proxy.workers)}
    # Group "a-0" would have the name of a replica of group "a".
    entries = [("engines", n, (group.name, *group.replica_names())) for n, group in enumerate(topology.engines)]
    entries += [("processes", n, (entry.name,)) for n, entry in enumerate(topology.processes)]
    entries += [("stores", n, (store.name,)) for n, store in enumerate(topology.stores)]
    for table, index, names in entries:
        taken = next((name for name in names if name in observed), None)
        if taken is not None:
            yield document.problem((table, index, "name"), f"the name {taken!r} is already used by {observed[taken]}")
        observed |= dict.fromkeys(names, f"{table}[{index}]")


def _service_problems(document: Document, topology: Topology) -> Iterator[Problem]:
    """Keys of [service] that are for certain kinds of engines, without such an engine."""
    kinds = {group.kind for group in topology.engines if not group.is_attached}
    effective = frozenset[str]().union(*(launcher(kind).service_settings for kind in kinds))
    for name in ("tool_parser", "reasoning_parser"):
        if name in document.data["service"] and name not in effective:
            message = f"{name} has no effect: no engine that pdctl starts here takes it"
            hint = "remove it; engines of other kinds take options of their own in args"
            yield document.problem(("service", name), message, hint)


def _proxy_problems(document: Document, proxy: Proxy) -> Iterator[Problem]:
    if bool(proxy.tls_cert) != bool(proxy.tls_key):
        given = "tls_cert" if proxy.tls_cert else "tls_key"
        yield document.problem(("proxy", given), "tls_cert and tls_key must be set together", "set both or neither")
    keys = {"api_keys": proxy.api_keys, "node_keys": proxy.node_keys}
    for key, path in (*keys.items(), ("tls_cert", proxy.tls_cert), ("tls_key", proxy.tls_key)):
        if path and not os.access(path, os.R_OK):
            hint = f"create it with: pdctl key NAME --file {path}" if key in keys else None
            yield document.problem(("proxy", key), f"{path} does not exist or cannot be read", hint)
    yield from _node_problems(document, proxy)
    yield from _file_problems(document, proxy)
    yield from _key_problems(document, proxy)
    if proxy.access_log and not Path(proxy.access_log).parent.is_dir():
        yield document.problem(("proxy", "access_log"), f"the folder of {proxy.access_log} does not exist")


def _node_problems(document: Document, proxy: Proxy) -> Iterator[Problem]:
    """Engines that register themselves need a key: whoever registers one sees the prompts of all clients."""
    if proxy.accept_nodes and not proxy.node_keys:
        hint = 'create a key with: pdctl key NAME --file nodes.keys    and set node_keys = "nodes.keys"'
        yield document.problem(("proxy", "accept_nodes"), "accept_nodes needs node_keys", hint)
    if proxy.node_keys and not proxy.accept_nodes:
        yield document.problem(("proxy", "node_keys"), "has no effect without accept_nodes", "set accept_nodes = true")


def _file_problems(document: Document, proxy: Proxy) -> Iterator[Problem]:
    """Problems in the content of files that would prevent the proxy from starting."""
    for name, path in (("api_keys", proxy.api_keys), ("node_keys", proxy.node_keys)):
        if path and os.access(path, os.R_OK):
            try:
                keys = read_api_keys(Path(path))
            except PdctlError as failure:
                yield document.problem(("proxy", name), failure.message, failure.hint)
                continue
            if not keys and name == "node_keys":
                hint = f"create one with: pdctl key NAME --file {path}"
                yield document.problem(("proxy", name), f"{path} has no key", hint)
    if proxy.tls_cert and proxy.tls_key and os.access(proxy.tls_cert, os.R_OK) and os.access(proxy.tls_key, os.R_OK):
        key, reason = tls_problem(proxy.tls_cert, proxy.tls_key)
        if key:
            yield document.problem(("proxy", key), reason, "both must be PEM files, the key without a password")


def _key_problems(document: Document, proxy: Proxy) -> Iterator[Problem]:
    """Settings of API keys that do not exist."""
    known = _names_of(proxy.api_keys)
    for index, key in enumerate(proxy.keys):
        path = ("keys", index, "name")
        if not proxy.api_keys:
            yield document.problem(path, "[[keys]] has no effect without proxy.api_keys", 'set api_keys = "keys.txt"')
        elif key.name in {other.name for other in proxy.keys[:index]}:
            yield document.problem(path, f"a second entry for {key.name!r}", "keep one of them")
        elif known is not None and key.name not in (*known, "*"):
            hint = f"create it with: pdctl key {key.name} --file {proxy.api_keys}"
            yield document.problem(path, f"{proxy.api_keys} has no key of the name {key.name!r}", hint)


def _names_of(path: str) -> set[str] | None:
    """The names in a file with API keys; None if it cannot be read."""
    try:
        return set(read_api_keys(Path(path)).values()) if path else None
    except PdctlError:
        return None


def _transfer_problems(document: Document, topology: Topology) -> Iterator[Problem]:
    """Keys that would have no effect."""
    transfer = topology.transfer
    chosen = TRANSPORTS.get(transfer.backend)
    by_connector = any(not group.is_attached and launcher(group.kind).connectors for group in topology.engines)
    on_host = (chosen is None or not chosen.crosses_hosts) and not by_connector
    hint = _set_backend(name for name, info in TRANSPORTS.items() if info.crosses_hosts)
    if transfer.protocol != "auto" and on_host:
        yield document.problem(("transfer", "protocol"), f"has no effect with backend {transfer.backend!r}", hint)
    if transfer.devices and on_host:
        yield document.problem(("transfer", "devices"), f"has no effect with backend {transfer.backend!r}", hint)
    if transfer.devices and transfer.protocol == "tcp":
        yield document.problem(
            ("transfer", "devices"), "RDMA devices have no effect with protocol 'tcp'", 'set protocol = "rdma"'
        )
    if chosen is not None and chosen.on_gpu and any(group.device is Device.CPU for group in topology.engines):
        message = f"{transfer.backend} moves KV between GPUs, and there are CPU engines"
        yield document.problem(("transfer", "backend"), message, 'set backend = "auto"')
    if transfer.ports and not (chosen and chosen.takes_ports):
        hint = _set_backend(name for name, info in TRANSPORTS.items() if info.takes_ports)
        yield document.problem(("transfer", "ports"), f"has no effect with backend {transfer.backend!r}", hint)


def _set_backend(names: Iterable[str]) -> str:
    return "set backend = " + " or ".join(f'"{name}"' for name in names)
