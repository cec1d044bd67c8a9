"""Answers of the control API about a service that runs on several machines."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from pdctl.control_api.meanings import says

ClusterNodeState = Literal["ready", "unknown", "silent"]


class ClusterNode(msgspec.Struct, frozen=True, kw_only=True):
    """One machine of a cluster."""

    name: Annotated[str, says("its name")]
    address: Annotated[str, says("HOST:PORT of its agent")]
    state: Annotated[
        ClusterNodeState,
        says("`ready`; `unknown`: it answers, but is not registered now; `silent`: it does not answer"),
    ]
    reason: Annotated[str, says("why it is not `ready`, else empty")] = ""
    version: Annotated[str, says("the version of its pdctl; empty if it does not answer")] = ""
    coordinator: Annotated[bool, says("whether its agent decides which node runs which engine")] = False
    asked: Annotated[bool, says("whether this answer comes from its agent")] = False
    engines: Annotated[tuple[str, ...], says("engines that it is to run")] = ()


class RegistryStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a node hears the registry of its cluster. While it does not, engines run on, and plans do not change."""

    ok: Annotated[bool, says("whether the registry answers")]
    since: Annotated[str, says("since when it does not, ISO 8601, else empty")] = ""
    reason: Annotated[str, says("why it does not, else empty")] = ""


class PublishedTopology(msgspec.Struct, frozen=True, kw_only=True):
    """The topology that a cluster runs."""

    text: Annotated[str, says("the content of the topology file; empty if none is published")]
    source: Annotated[str, says("the file that it came from")]
    revision: Annotated[int, says("its revision in the registry; 0 if none is published")]


class TopologyOrder(msgspec.Struct, frozen=True, kw_only=True):
    """A cluster is to run another topology."""

    text: Annotated[str, says("the content of the topology file")]
    source: Annotated[str, says("the file that it came from")]
    revision: Annotated[int | None, says("refuse it if another revision is published; null: replace any")] = None
    dry_run: Annotated[bool, says("only say what would change")] = False


class NodeChanges(msgspec.Struct, frozen=True, kw_only=True):
    """What a topology changes on one node."""

    node: Annotated[str, says("its name")]
    unknown: Annotated[str, says("why this is not known, else empty")] = ""
    refused: Annotated[bool, says("whether the node will not carry it out, for that reason")] = False
    added: Annotated[tuple[str, ...], says("processes that are started")] = ()
    removed: Annotated[tuple[str, ...], says("processes that are drained and stopped")] = ()
    restarted: Annotated[dict[str, str], says("processes that are restarted, each with the reason")] = {}
    live: Annotated[
        dict[str, str],
        says("processes that change without a restart, each with what changes; `pdctl` is the supervisor"),
    ] = {}
    unchanged: Annotated[tuple[str, ...], says("processes that do not change")] = ()
