"""Ray gets agents onto nodes. The only module that imports ray.

Nothing that serves tokens is a child of a Ray process: Ray kills those. A detached actor on each node starts the agent
as a daemon, or finds the one that runs by its lock, and only watches it. The actors fill a detached placement group,
which reserves GPUs and CPUs against other jobs. Its bundles name nodes by their addresses: a raylet that has been
started again is a new node to Ray, but gets its bundle and its actor back.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import msgspec
import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import RayError
from ray.util import (
    get_placement_group,
    list_named_actors,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from pdctl.errors import PdctlError
from pdctl.launchers.ending import end_agent
from pdctl.launchers.launcher import STARTING, Standing, Started, Wanted
from pdctl.launchers.node import Launch, keeper_of
from pdctl.launchers.reservation import Bundle, Offer, bundles_of, check_fits, node_names

_NAMESPACE = "pdctl"
# Of a node's own resource, which only names it.
_NAMED = 0.001
# Seconds: for Ray to reserve, an actor to answer or to let go, an agent to end, Ray to forget.
_RESERVE_S, _ANSWER_S, _RELEASE_S, _END_S, _FORGET_S = 20.0, 5.0, 10.0, 700.0, 10.0
_POLL_S = 0.05


class _Method(Protocol):
    def remote(self, *given: object) -> object: ...


class _Watcher(Protocol):
    """The handle of a Watcher."""

    launch: _Method
    standing: _Method
    end: _Method


class Watcher:
    """The actor: keeps the agent of its node alive. `launch`: a Launch as JSON."""

    def __init__(self, launch: bytes) -> None:
        self._launch = launch
        decoded = msgspec.json.decode(launch, type=Launch)
        self._service = decoded.service
        self._keeper = keeper_of(decoded, int(os.environ["RAY_RAYLET_PID"]))
        self._keeper.begin()

    def launch(self) -> bytes:
        """What it was made with."""
        return self._launch

    def standing(self) -> bytes:
        """How the agent is: a Standing as JSON."""
        return msgspec.json.encode(self._keeper.standing)

    def end(self, now: bool) -> bool:
        """End the agent, and do not start it again. Returns whether there was one."""
        if not self._keeper.release(_RELEASE_S):
            raise PdctlError("its watcher is in the middle of a start")
        return end_agent(self._service, now)


@dataclass(frozen=True, slots=True)
class _Node:
    """A node of Ray that lives. `id` changes whenever its raylet starts."""

    name: str
    address: str
    id: str
    total: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class _Group:
    """A placement group, and its bundles in their order."""

    handle: PlacementGroup
    bundles: list[Bundle]


def connect(address: str) -> RayLauncher:
    """Join the Ray cluster that this machine is a node of. Raises PdctlError."""
    try:
        ray.init(
            address=address or "auto",
            namespace=_NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError, RayError) as failure:
        first = str(failure).strip().partition("\n")[0]
        hint = "is this machine a node of the cluster (ray status)? are ray_address and ray_token_file right?"
        raise PdctlError(f"Ray cannot be used: {first}", hint) from failure
    return RayLauncher()


class RayLauncher:
    """See Launcher."""

    def start(self, wanted: Wanted) -> Started:
        """See Launcher."""
        notes = [] if _is_guarded() else ["Ray asks nobody for a token: whoever reaches it runs code on all nodes"]
        nodes = _nodes()
        group = _group_of(wanted.service)
        if is_new := group is None:
            bundles = bundles_of(_offers(nodes), wanted)
            group = _reserve(wanted.service, bundles)
        else:
            check_fits(group.bundles, wanted)
        there = {node.name for node in nodes}
        for index, bundle in enumerate(group.bundles):
            _have_watched(group, index, wanted)
            if bundle.node not in there:
                notes.append(f"Ray has lost node {bundle.node}: its agent is not watched until the node is back")
        return Started(is_new, tuple(notes))

    def agents(self, service: str) -> list[Standing]:
        """See Launcher. Of nodes that Ray has lost nothing is said."""
        there = {node.name for node in _nodes()}
        watchers = {node: watcher for node, watcher in _watchers(service).items() if node in there}
        told = _standings(watchers)
        return [told.get(node) or Standing(node, STARTING, reason="its watcher does not answer") for node in watchers]

    def give_back(self, service: str, now: bool) -> list[str]:
        """See Launcher."""
        watchers, nodes = _watchers(service), _nodes()
        told = _standings({node.name: watchers[node.name] for node in nodes if node.name in watchers})
        ended, _ = _answers({node: watchers[node].end.remote(now) for node in told})
        _forget(service)
        # Also where no watcher is: Ray forgets everything when its head starts anew, and agents go on.
        more, failures = _answers({n.name: _on(n).remote(service, now) for n in nodes if n.name not in ended})
        failures |= dict.fromkeys(watchers.keys() - {node.name for node in nodes}, "Ray has lost the node")
        if failures:
            listed = "; ".join(f"{node}: {why}" for node, why in failures.items())
            raise PdctlError(f"agents may run on {listed}", "call pdctl down again when that has changed")
        return [node for node, was_there in (ended | more).items() if was_there]


# -- nodes -------------------------------------------------------------------------------------------------


def _nodes() -> list[_Node]:
    # Of two raylets at one address, the one that is dead may not be known to be so yet.
    alive = {entry["NodeManagerAddress"]: entry for entry in ray.nodes() if entry["Alive"]}
    names = node_names([(entry["NodeManagerHostname"], address) for address, entry in alive.items()])
    found = sorted(zip(names, alive, strict=True))
    return [_Node(name, at, alive[at]["NodeID"], alive[at]["Resources"]) for name, at in found]


def _offers(nodes: Sequence[_Node]) -> list[Offer]:
    free, here = available_resources_per_node(), ray.get_runtime_context().get_node_id()

    def counts(node: _Node, kind: str) -> tuple[int, int]:
        return int(free.get(node.id, {}).get(kind, 0)), int(node.total.get(kind, 0))

    return [Offer(n.name, n.address, counts(n, "GPU"), counts(n, "CPU"), n.id == here) for n in nodes]


# -- the group ---------------------------------------------------------------------------------------------


def _group_of(service: str) -> _Group | None:
    for entry in placement_group_table().values():
        if entry["name"] == _group_name(service) and entry["state"] != "REMOVED":
            bundles = [_bundle(resources) for _, resources in sorted(entry["bundles"].items())]
            return _Group(get_placement_group(_group_name(service)), bundles)
    return None


def _bundle(resources: Mapping[str, float]) -> Bundle:
    address = next(name.partition(":")[2] for name in resources if name.startswith("node:"))
    known = {entry["NodeManagerAddress"]: entry["NodeManagerHostname"] for entry in ray.nodes()}
    names = dict(zip(known, node_names([(host, at) for at, host in known.items()]), strict=True))
    return Bundle(names.get(address, address), address, int(resources.get("GPU", 0)), int(resources["CPU"]))


def _reserve(service: str, bundles: Sequence[Bundle]) -> _Group:
    """Raises PdctlError."""
    wanted = [{"CPU": b.cpus, f"node:{b.address}": _NAMED, **({"GPU": b.gpus} if b.gpus else {})} for b in bundles]
    handle = placement_group(wanted, strategy="STRICT_SPREAD", name=_group_name(service), lifetime="detached")
    if not handle.wait(_RESERVE_S):
        remove_placement_group(handle)
        listed = ", ".join(f"{b.node}: {b.gpus} GPUs, {b.cpus} CPUs" for b in bundles)
        raise PdctlError(
            f"Ray did not reserve within {_RESERVE_S:g} s: {listed}", "other jobs were faster: see ray status"
        )
    return _Group(handle, list(bundles))


def _forget(service: str) -> None:
    """Remove watchers and group. Raises PdctlError."""
    for watcher in _watchers(service).values():
        ray.kill(watcher, no_restart=True)
    if (group := _group_of(service)) is not None:
        remove_placement_group(group.handle)
    _until(lambda: not _watchers(service) and _group_of(service) is None, f"Ray still holds what {service} had")


# -- watchers ----------------------------------------------------------------------------------------------


def _have_watched(group: _Group, index: int, wanted: Wanted) -> None:
    """Have a watcher on the node of a bundle, which does what is wanted now. Raises PdctlError."""
    bundle = group.bundles[index]
    launch = msgspec.json.encode(Launch(wanted.service, bundle.node, wanted.file, bundle.gpus, wanted.allow_commands))
    before = _watchers(wanted.service).get(bundle.node)
    if before is not None:
        if _does(before, launch):
            return
        # Another takes its place, and finds the agent by its lock.
        ray.kill(before, no_restart=True)
        _until(lambda: bundle.node not in _watchers(wanted.service), f"Ray still has the watcher of {bundle.node}")
    place = PlacementGroupSchedulingStrategy(group.handle, placement_group_bundle_index=index)
    ray.remote(Watcher).options(
        name=_actor_name(wanted.service, bundle.node), namespace=_NAMESPACE, lifetime="detached", max_restarts=-1,
        num_cpus=bundle.cpus, num_gpus=bundle.gpus, scheduling_strategy=place,
    ).remote(launch)  # fmt: skip


def _does(watcher: _Watcher, launch: bytes) -> bool:
    try:
        return bool(ray.get(watcher.launch.remote(), timeout=_ANSWER_S) == launch)
    except RayError:
        return False


def _watchers(service: str) -> dict[str, _Watcher]:
    """Those that Ray has, by node."""
    found, prefix = {}, _actor_name(service, "")
    for actor in list_named_actors(all_namespaces=True):
        if actor["namespace"] == _NAMESPACE and actor["name"].startswith(prefix):
            # It may have gone since it was listed.
            with contextlib.suppress(ValueError):
                handle = cast(_Watcher, ray.get_actor(actor["name"], namespace=_NAMESPACE))
                found[actor["name"].removeprefix(prefix)] = handle
    return found


def _answers(asked: Mapping[str, object]) -> tuple[dict[str, bool], dict[str, str]]:
    """What nodes say of an end, and why others do not."""
    answers, failures = {}, {}
    for node, answer in asked.items():
        try:
            answers[node] = bool(ray.get(answer, timeout=_END_S))
        except RayError as failure:
            failures[node] = _cause(failure)
    return answers, failures


def _standings(watchers: Mapping[str, _Watcher]) -> dict[str, Standing]:
    """How the agents are, of those whose watchers answer."""
    asked = {node: watcher.standing.remote() for node, watcher in watchers.items()}
    if asked:
        ray.wait([*asked.values()], num_returns=len(asked), timeout=_ANSWER_S)
    found = {}
    for node, answer in asked.items():
        with contextlib.suppress(RayError):
            found[node] = msgspec.json.decode(ray.get(answer, timeout=0), type=Standing)
    return found


# -- small things ------------------------------------------------------------------------------------------


def _on(node: _Node) -> _Method:
    """`end_agent` on a node."""
    place = NodeAffinitySchedulingStrategy(node.id, soft=False)
    return cast(_Method, ray.remote(end_agent).options(num_cpus=0, max_retries=0, scheduling_strategy=place))


def _until(is_so: Callable[[], bool], complaint: str) -> None:
    """Raises PdctlError."""
    deadline = time.monotonic() + _FORGET_S
    while not is_so():
        if time.monotonic() > deadline:
            raise PdctlError(f"{complaint} after {_FORGET_S:g} s", "see: ray status")
        time.sleep(_POLL_S)


def _group_name(service: str) -> str:
    return f"pdctl:{service}"


def _actor_name(service: str, node: str) -> str:
    return f"{service}/{node}"


def _is_guarded() -> bool:
    return os.environ.get("RAY_AUTH_MODE") == "token"


def _cause(failure: RayError) -> str:
    """What went wrong there, without Ray's account of it."""
    return str(getattr(failure, "cause", None) or failure).strip().partition("\n")[0]
