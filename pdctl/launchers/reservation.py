"""What the agents of a service need of which node, from its topology and what a cluster's manager offers. Pure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import tomli

from pdctl.errors import PdctlError
from pdctl.launchers.launcher import Wanted
from pdctl.plan.cluster import wishes_of
from pdctl.plan.placement import Room, Wish, assign, check_spare, fit
from pdctl.topology.spec import Cluster, Topology
from pdctl.topology.toml_lines import key_lines

# Of an agent and its proxy together.
_AGENT_CPUS = 1
# Keys of [cluster] with a path, which may be relative to the file that has it.
_PATHS = ("secret_file", "certificates", "etcd_password_file", "ray_token_file")


@dataclass(frozen=True, slots=True)
class Offer:
    """A node. `gpus`, `cpus`: how many are free, and how many there are; `is_here`: the command runs there."""

    node: str
    address: str
    gpus: tuple[int, int]
    cpus: tuple[int, int]
    is_here: bool = False


@dataclass(frozen=True, slots=True)
class Bundle:
    """What is reserved on a node."""

    node: str
    address: str
    gpus: int
    cpus: int


def wanted_of(topology: Topology) -> Wanted:
    """The agents that a topology needs. Raises PdctlError if its text cannot be given to other machines."""
    assert topology.cluster is not None
    groups = [group for group in topology.engines if not group.is_attached]
    return Wanted(
        service=topology.service.name,
        file=portable(topology.text, topology.cluster),
        engines=tuple(wishes_of(topology)),
        cpus={name: len(group.cpus) or 1 for group in groups for name in group.replica_names()},
        spare=topology.cluster.spare_nodes,
        proxies=topology.proxy.nodes,
        allow_commands=topology.cluster.ray_allow_commands,
    )


def portable(text: str, cluster: Cluster) -> str:
    """The text of a topology with absolute paths in [cluster]: it is read from another folder. Raises PdctlError."""
    lines, places = text.splitlines(), key_lines(text)
    for key in _PATHS:
        line, path = places.get(("cluster", key)), getattr(cluster, key)
        if line is not None:
            lines[line - 1] = f"{key} = {json.dumps(path, ensure_ascii=False)}"
    made = "\n".join([*lines, ""])
    try:
        found = tomli.loads(made)["cluster"]
    except tomli.TOMLDecodeError:
        found = {}
    for key in _PATHS:
        if found.get(key, getattr(cluster, key)) != getattr(cluster, key):
            raise PdctlError(f"cluster.{key} cannot be given to other nodes", "write an absolute path, on one line")
    return made


def bundles_of(offers: Sequence[Offer], wanted: Wanted) -> list[Bundle]:
    """What to reserve: on nodes that get engines what these need; with spare nodes, all free GPUs of all nodes that may
    have to take them. A node with a proxy, and the one where the command runs, have an agent in any case.

    Raises PdctlError with what is missing.
    """
    rooms = {offer.node: Room(offer.gpus[0]) for offer in offers}
    places = assign(wanted.engines, rooms, {})
    check_spare(wanted.engines, rooms, places, wanted.spare)
    gpus = _gpus(wanted.engines, places)
    if fit(wanted.engines, {node: Room(count) for node, count in gpus.items()}, {}).failures:
        # The coordinator places engines on what is reserved in its own order. It finds this one in all that is free.
        gpus = Counter({node: rooms[node].gpus for node in gpus})
    if wanted.spare:
        on_gpus = any(wish.gpus for wish in wanted.engines)
        may = [o for o in offers if any(wish.may_run_on(o.node) for wish in wanted.engines)]
        gpus = Counter({offer.node: offer.gpus[0] * on_gpus for offer in may})
    _check_named(wanted.proxies, rooms)
    chosen = {*places.values(), *gpus, *wanted.proxies, *(offer.node for offer in offers if offer.is_here)}
    cpus = Counter(dict.fromkeys(chosen, _AGENT_CPUS))
    for name, node in places.items():
        cpus[node] += wanted.cpus[name]
    _check_cpus(offers, cpus)
    return [Bundle(o.node, o.address, gpus[o.node], cpus[o.node]) for o in offers if o.node in chosen]


def check_fits(bundles: Sequence[Bundle], wanted: Wanted) -> None:
    """Raise PdctlError if what was reserved before does not do any more."""
    rooms = {bundle.node: Room(bundle.gpus) for bundle in bundles}
    try:
        places = assign(wanted.engines, rooms, {})
        check_spare(wanted.engines, rooms, places, wanted.spare)
        _check_named(wanted.proxies, rooms)
    except PdctlError as failure:
        hint = "what is reserved does not grow: pdctl down, then up"
        raise PdctlError(f"in what was reserved for this service: {failure.message}", hint) from failure


def node_names(hosts: Sequence[tuple[str, str]]) -> list[str]:
    """Names of nodes for their (host name, address): the host name, unless two have the same."""
    short = [host.partition(".")[0] for host, _ in hosts]
    return [
        name if short.count(name) == 1 else f"{name}-{address.replace('.', '-').replace(':', '-')}"
        for name, (_, address) in zip(short, hosts, strict=True)
    ]


def _gpus(engines: Sequence[Wish], places: dict[str, str]) -> Counter[str]:
    """How many GPUs the engines need on each node. Those that share need as many as the largest of them, at least."""
    needed: Counter[str] = Counter()
    for wish in engines:
        if not wish.shares:
            needed[places[wish.name]] += wish.gpus
    for wish in engines:
        node = places[wish.name]
        needed[node] = max(needed[node], wish.gpus)
    return needed


def _check_named(named: Collection[str], known: Collection[str]) -> None:
    if missing := sorted(set(named) - set(known)):
        hint = f"known nodes: {', '.join(known) or 'none'}"
        raise PdctlError(f"[proxy] nodes names {', '.join(missing)}, which is no node", hint)


def _check_cpus(offers: Sequence[Offer], cpus: Counter[str]) -> None:
    for offer in offers:
        if cpus[offer.node] > offer.cpus[0]:
            free, known = offer.cpus
            raise PdctlError(
                f"node {offer.node} has {free} of {known} CPUs free, and {cpus[offer.node]} are needed",
                "end other jobs there, or lower replicas",
            )
