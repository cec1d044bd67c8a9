"""Checks what a topology says of several machines: [cluster], `nodes`, and what works on one machine only."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pdctl.adapters import Ability, control
from pdctl.errors import Problem
from pdctl.net import LOOPBACK
from pdctl.topology.document import Document
from pdctl.topology.spec import Cluster, Device, EngineGroup, Topology
from pdctl.topology.toml_lines import Path as KeyPath
from pdctl.transports import FAR, TRANSPORTS

# https://10.0.0.1:2379, a host name, or an IPv6 address in brackets.
_MEMBER = re.compile(r"(https?)://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\]):([0-9]{1,5})/?")
# Names of nodes are parts of keys in the registry, and of file names.
_NODE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
_CELL = re.compile(r"[A-Za-z0-9*?][A-Za-z0-9._*?-]{0,63}")
_ANY_ADDRESS = ("0.0.0.0", "::")
_ONE_MACHINE = "works on one machine only so far: "


def cluster_problems(document: Document, topology: Topology) -> Iterator[Problem]:
    """Yield every problem of a service on several machines that needs none of them to be seen."""
    yield from _node_problems(document, topology)
    if topology.cluster is None:
        return
    yield from _member_problems(document, topology.cluster)
    yield from _access_problems(document, topology.cluster)
    yield from _cell_problems(document, topology.cluster)
    yield from _launcher_problems(document, topology.cluster)
    yield from _unsupported_problems(document, topology)
    yield from _transfer_problems(document, topology)
    yield from _proxy_problems(document, topology)
    for index, group in enumerate(topology.engines):
        yield from _group_problems(document, index, group)
        yield from _order_problems(document, index, group, topology)


def _node_problems(document: Document, topology: Topology) -> Iterator[Problem]:
    named: list[tuple[KeyPath, tuple[str, ...]]] = [(("proxy", "nodes"), topology.proxy.nodes)]
    named += [(("engines", index, "nodes"), group.nodes) for index, group in enumerate(topology.engines)]
    for path, nodes in named:
        if nodes and topology.cluster is None:
            yield document.problem(path, "nodes has no effect without [cluster]", "add [cluster], or remove nodes")
        for name in nodes:
            if not _NODE.fullmatch(name):
                hint = (
                    "letters, digits and inner dots, dashes and underscores, at most 64: what pdctl agent --node takes"
                )
                yield document.problem(path, f"{name!r} is no name of a node", hint)


def _member_problems(document: Document, cluster: Cluster) -> Iterator[Problem]:
    path = ("cluster", "etcd")
    example = 'such as etcd = ["https://10.0.0.1:2379"]'
    if not cluster.etcd:
        yield document.problem(path, "names no member of etcd", example)
    schemes = set()
    for url in cluster.etcd:
        found = _MEMBER.fullmatch(url)
        if found is None or not 1 <= int(found[3]) <= 65535:
            yield document.problem(
                path, f"{url!r} is no address of a member of etcd", f"http(s)://HOST:PORT, {example}"
            )
        else:
            schemes.add(found[1])
    if len(schemes) > 1:
        yield document.problem(path, "some members have https and others http", "use one of the two for all members")


def _launcher_problems(document: Document, cluster: Cluster) -> Iterator[Problem]:
    given = document.data["cluster"]
    if cluster.launcher == "ssh" and not cluster.ssh_nodes:
        yield document.problem(("cluster", "launcher"), 'launcher = "ssh" needs ssh_nodes', 'such as ssh_nodes = ["a"]')
    for key in given:
        kind = key.partition("_")[0]
        if kind in ("ssh", "ray") and kind != cluster.launcher:
            hint = f'set launcher = "{kind}", or remove {key}'
            yield document.problem(("cluster", key), f"{key} has no effect with launcher {cluster.launcher!r}", hint)


def _access_problems(document: Document, cluster: Cluster) -> Iterator[Problem]:
    if bool(cluster.etcd_user) != bool(cluster.etcd_password_file):
        given = "etcd_user" if cluster.etcd_user else "etcd_password_file"
        message = "etcd_user and etcd_password_file must be set together"
        yield document.problem(("cluster", given), message, "set both or neither")


def _cell_problems(document: Document, cluster: Cluster) -> Iterator[Problem]:
    for pattern in cluster.cells:
        if not _CELL.fullmatch(pattern):
            hint = 'such as cells = ["rack1-*", "rack2-*"]'
            yield document.problem(("cluster", "cells"), f"{pattern!r} is no pattern of node names", hint)


def _unsupported_problems(document: Document, topology: Topology) -> Iterator[Problem]:
    """Parts of a service that know of one machine only."""
    if topology.proxy.accept_nodes:
        message = f"{_ONE_MACHINE}engines that register themselves are known to one proxy"
        hint = "remove it; attach such engines by url"
        yield document.problem(("proxy", "accept_nodes"), message, hint)
    if topology.elastic.mode != "off":
        message = (
            f"{_ONE_MACHINE}each node's supervisor sees its own engines, and could leave the service without a role"
        )
        yield document.problem(("elastic", "mode"), message, 'set mode = "off", or remove [elastic]')
    named = [("stores", index, store.name) for index, store in enumerate(topology.stores)]
    named += [("processes", index, entry.name) for index, entry in enumerate(topology.processes)]
    for table, index, name in named:
        hint = "start it yourself, by systemd for example, and remove it here"
        yield document.problem((table, index), f"[[{table}]] {_ONE_MACHINE}{name} would have no place", hint)


def _transfer_problems(document: Document, topology: Topology) -> Iterator[Problem]:
    backend = topology.transfer.backend
    if backend in TRANSPORTS and not TRANSPORTS[backend].crosses_hosts:
        hint = 'set backend = "auto", which still takes the fastest way between engines on one node, or ' + " or ".join(
            f'"{name}"' for name in FAR
        )
        yield document.problem(("transfer", "backend"), f"{backend} does not reach other machines", hint)


def _proxy_problems(document: Document, topology: Topology) -> Iterator[Problem]:
    """An address that only one node can have."""
    proxy = topology.proxy
    if proxy.host not in (LOOPBACK, *_ANY_ADDRESS) and len(proxy.nodes) != 1:
        hint = 'remove host: each proxy listens on its node\'s address; or name the one node: nodes = ["..."]'
        yield document.problem(("proxy", "host"), f"{proxy.host} is the address of one node, at most", hint)


def _group_problems(document: Document, index: int, group: EngineGroup) -> Iterator[Problem]:
    if Ability.SWEEP in control(group.kind).abilities:
        # A sweep, and the room for KV, count the requests of this node's proxies. Others could still need that KV.
        message = f"{_ONE_MACHINE}engines of kind {group.kind!r} do not protect the KV that other nodes still need"
        yield document.problem(("engines", index, "kind"), message, "use another kind, or one machine")
    if group.gpus and group.device is Device.CUDA and len(group.nodes) != 1:
        hint = 'name that node: nodes = ["..."]; or remove gpus: each node chooses among its own'
        yield document.problem(("engines", index, "gpus"), "gpus names the GPUs of one node", hint)
    if _is_loopback(group.url):
        hint = "set the address at which all nodes reach the engine"
        yield document.problem(
            ("engines", index, "url"), "on each node, this is another machine: the node itself", hint
        )


def _order_problems(document: Document, index: int, group: EngineGroup, topology: Topology) -> Iterator[Problem]:
    """Groups that wait for each other, or restart together: a node's supervisor knows its own only."""
    one_node = {other.name: other.nodes for other in topology.engines if len(other.nodes) == 1}
    for key, names in (("depends_on", group.depends_on), ("restart_with", group.restart_with)):
        for name in names:
            if group.name not in one_node or one_node.get(name) != group.nodes:
                hint = (
                    f'remove it, or give both groups the same one node: nodes = ["..."]; here {group.name} and {name}'
                )
                yield document.problem(("engines", index, key), f"{key} works between engines of one node only", hint)


def _is_loopback(url: str) -> bool:
    host = url.removeprefix("http://").rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")
