"""One answer for a whole cluster, made of those of its nodes. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from pdctl.control_api import (
    ApplyProgress,
    ClusterNode,
    KeysStatus,
    KeyStatus,
    KvStatus,
    ProcessStatus,
    RegistryStatus,
    ServiceState,
    ServiceStatus,
)
from pdctl.plan.spec import PROXY
from pdctl.supervisor.surface.cluster.agents import AgentAddress, Silent

Status = TypeVar("Status", bound=ServiceStatus)
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """What a node knows of its cluster. `coordinator`: the node that places engines, "" if unknown; `places`: the node
    that each engine of the published topology is to run on, "" for none; `problem`: why they are not all placed, or
    ""."""

    registry: RegistryStatus
    coordinator: str = ""
    places: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


def merged_status(
    own: AgentAddress,
    local: Status,
    agents: Iterable[AgentAddress],
    answers: Mapping[str, Status | Silent],
    facts: ClusterFacts,
) -> Status:
    """The status of a cluster, asked at node `own`. `answers`: of the other nodes."""
    known = sorted([own, *agents], key=lambda agent: agent.node)
    told = {own.node: local, **answered(answers)}
    told = {agent.node: told[agent.node] for agent in known if agent.node in told}
    names = shown_names({node: status.processes for node, status in told.items()})
    silent = {node: answer.reason for node, answer in answers.items() if isinstance(answer, Silent)}
    processes = tuple(
        msgspec.structs.replace(process, node=node, name=names[node, process.name])
        for node, status in told.items()
        for process in status.processes
    )
    here = {process.name for status in told.values() for process in status.processes}
    unplaced = tuple(name for name, node in facts.places.items() if name not in here and node not in silent)
    fronts = [status for status in (local, *told.values()) if has_proxy(status)]
    front = fronts[0] if fronts else local
    return msgspec.structs.replace(
        local,
        state=_word(list(told.values()), bool(silent), unplaced),
        failure="; ".join(f"{node}: {status.failure}" for node, status in told.items() if status.failure) or None,
        proxy_url=front.proxy_url,
        model=front.model,
        served_model_name=front.served_model_name,
        tls_cert=front.tls_cert,
        apply=_progress({node: status.apply for node, status in told.items() if status.apply is not None}),
        processes=processes,
        attached=_once(attached for status in told.values() for attached in status.attached),
        links=tuple(link for status in told.values() for link in status.links),
        nodes=tuple(_node(agent, own, silent, facts) for agent in known),
        registry=facts.registry,
        proxy_urls=tuple(dict.fromkeys(status.proxy_url for status in told.values() if has_proxy(status))),
        unplaced=unplaced,
        refused="; ".join(
            [*([facts.problem] if facts.problem else [])]
            + [f"{node}: {status.refused}" for node, status in told.items() if status.refused]
        ),
    )


def answered(answers: Mapping[str, Answer | Silent]) -> dict[str, Answer]:
    """Those that are no silence."""
    return {node: answer for node, answer in answers.items() if not isinstance(answer, Silent)}


def shown_names(processes: Mapping[str, Sequence[ProcessStatus]]) -> dict[tuple[str, str], str]:
    """How processes are shown, by node and name: an engine by its name, which no other engine has; others, such as
    proxies, are called alike on all nodes and shown as NODE/NAME."""
    engines = Counter(process.name for found in processes.values() for process in found if process.is_engine)
    return {
        (node, process.name): process.name if engines[process.name] == 1 else f"{node}/{process.name}"
        for node, found in processes.items()
        for process in found
    }


def owner_of(name: str, processes: Mapping[str, Sequence[ProcessStatus]], silent: Iterable[str]) -> tuple[str, str]:
    """The node and the name there of a process that is called NAME or NODE/NAME. Raises LookupError with a reason."""
    found = [
        (node, process.name)
        for node, there in processes.items()
        for process in there
        if name in (process.name, f"{node}/{process.name}")
    ]
    if len(found) == 1:
        return found[0]
    if found:
        choices = ", ".join(f"{node}/{bare}" for node, bare in found)
        raise LookupError(f"several nodes have a process {name!r}: choose one of {choices}")
    known = ", ".join(shown_names(processes).values()) or "none"
    missing = f"; no answer from {', '.join(silent)}" if silent else ""
    raise LookupError(f"no process {name!r}; known: {known}{missing}")


def merged_kv(answers: Mapping[str, KvStatus | Silent]) -> KvStatus:
    """The KV of all nodes."""
    found = answered(answers).values()
    unreachable = {name: reason for kv in found for name, reason in kv.unreachable.items()}
    for node, answer in answers.items():
        if isinstance(answer, Silent):
            unreachable[f"node {node}"] = answer.reason
    return KvStatus(
        engines=tuple(engine for kv in found for engine in kv.engines),
        leases=tuple(lease for kv in found for lease in kv.leases),
        unreachable=unreachable,
    )


def merged_keys(answers: Mapping[str, KeysStatus | Silent]) -> KeysStatus:
    """The API keys, as the proxies of all nodes counted them."""
    found: dict[str, list[KeyStatus]] = {}
    for answer in answered(answers).values():
        for key in answer.keys:
            found.setdefault(key.name, []).append(key)
    return KeysStatus(keys=tuple(_key(found[name]) for name in sorted(found)))


def has_proxy(status: ServiceStatus) -> bool:
    """Whether clients can be served there."""
    return any(process.role == PROXY for process in status.processes)


def _word(told: Sequence[ServiceStatus], has_silent: bool, unplaced: Sequence[str]) -> ServiceState:
    """The state of all nodes together."""
    words = {status.state for status in told if status.processes or status.state != "ready"}
    for word in ("stopping", "failed", "degraded"):
        if word in words:
            return word
    if "starting" in words or (unplaced and not words):
        return "starting"
    if unplaced or has_silent:
        return "degraded"
    return "ready" if words or any(status.attached for status in told) else "empty"


def _node(agent: AgentAddress, own: AgentAddress, silent: Mapping[str, str], facts: ClusterFacts) -> ClusterNode:
    reason = silent.get(agent.node, "" if agent.registered else "the registry does not know it now")
    return ClusterNode(
        name=agent.node,
        address=agent.text,
        state="silent" if agent.node in silent else "ready" if agent.registered else "unknown",
        reason=reason,
        version=agent.version,
        coordinator=agent.node == facts.coordinator,
        asked=agent.node == own.node,
        engines=tuple(name for name, node in facts.places.items() if node == agent.node),
    )


def _progress(applies: Mapping[str, ApplyProgress]) -> ApplyProgress | None:
    """A failed apply before one that runs, before one that is done."""
    for state in ("failed", "running"):
        for node, progress in applies.items():
            if progress.state == state:
                step = f"{node}: {progress.step}" if progress.step else ""
                error = f"{node}: {progress.error}" if progress.error else ""
                return msgspec.structs.replace(progress, step=step, error=error)
    return next(iter(applies.values()), None)


def _once(found: Iterable[Answer]) -> tuple[Answer, ...]:
    """Without those that have the name of an earlier one: attached engines belong to every node."""
    return tuple({str(getattr(one, "name", "")): one for one in reversed(list(found))}.values())[::-1]


def _key(uses: Sequence[KeyStatus]) -> KeyStatus:
    requests, first = sum(use.requests for use in uses), [use for use in uses if use.ttft_s is not None]
    answers = sum(use.requests for use in first)
    left = [use.requests_left for use in uses if use.requests_left is not None]
    tokens_left = [use.tokens_left for use in uses if use.tokens_left is not None]
    return msgspec.structs.replace(
        uses[0],
        running=sum(use.running for use in uses),
        waiting=sum(use.waiting for use in uses),
        requests=requests,
        refused=sum(use.refused for use in uses),
        prompt_tokens=sum(use.prompt_tokens for use in uses),
        cached_tokens=sum(use.cached_tokens for use in uses),
        output_tokens=sum(use.output_tokens for use in uses),
        queue_s=round(sum(use.queue_s * use.requests for use in uses) / max(1, requests), 6),
        ttft_s=round(sum((use.ttft_s or 0.0) * use.requests for use in first) / answers, 6) if answers else None,
        # What one node's proxies count of the others' use is at most what those say themselves.
        requests_left=min(left) if left else None,
        tokens_left=min(tokens_left) if tokens_left else None,
    )
