"""Writes docs/status-json.md from the messages and the texts below. Run by `scripts/status-json`."""

from __future__ import annotations

import sys
import textwrap
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import msgspec

from pdctl.control_api.cluster_messages import (
    ClusterNode,
    NodeChanges,
    PublishedTopology,
    RegistryStatus,
    TopologyOrder,
)
from pdctl.control_api.examination_messages import (
    ClusterExamination,
    ExamineOrder,
    NodeExamination,
    NodeFinding,
    NodeReport,
    NodeTraits,
    RdmaPort,
    TransferOrder,
    TransferResult,
)
from pdctl.control_api.messages import (
    HEARTBEAT_S,
    MOST_WAITING,
    ApplyProgress,
    AttachedStatus,
    DashboardOrder,
    Event,
    ExitReport,
    LastExit,
    Link,
    MeasuredProcess,
    MeasuredStatus,
    Node,
    NodeStatus,
    ProcessStatus,
    Reply,
    ResourceUse,
    RoleOrder,
    StepLatency,
    StepPredictions,
    Stopping,
    Takeover,
    TopologyReply,
    UpgradeOrder,
    Verb,
)
from pdctl.control_api.usage_messages import EngineBlocks, KeysStatus, KeyStatus, KvStatus, Lease, LogNames, LogPart
from pdctl.kv_events import Endpoints
from pdctl.plan import Attached, Plan, Probe, ProcessSpec
from pdctl.plan.changes import Changes
from pdctl.topology.spec import Dashboard, Elastic, Proxy, Supervision

# The heading of each class that has a section.
_SECTIONS: dict[type, str] = {
    MeasuredProcess: "Process",
    ProcessStatus: "Process",
    LastExit: "Last exit",
    Link: "Link",
    AttachedStatus: "Attached engine",
    ApplyProgress: "Apply",
    StepLatency: "Latency model",
    StepPredictions: "Predictions",
    EngineBlocks: "Blocks of an engine",
    Lease: "Lease",
    KeyStatus: "API key",
    ResourceUse: "Resource use",
    Takeover: "Takeover",
    ProcessSpec: "Planned process",
    Probe: "Probe",
    Attached: "Planned attached engine",
    Node: "Registration",
    NodeStatus: "Registered engine",
    RoleOrder: "Change of a role",
    UpgradeOrder: "Order to upgrade",
    DashboardOrder: "Order for the live page",
    Reply: "Reply",
    LogNames: "Logs",
    LogPart: "Piece of a log",
    ClusterNode: "Node of a cluster",
    RegistryStatus: "Registry",
    PublishedTopology: "Published topology",
    TopologyOrder: "Order for a topology",
    NodeChanges: "Changes of a node",
    TopologyReply: "Reply to an order for a topology",
    ExamineOrder: "Order to examine all nodes",
    ClusterExamination: "Examination of all nodes",
    NodeExamination: "Examination of a node",
    NodeReport: "Report of a node",
    NodeFinding: "Finding",
    NodeTraits: "Traits of a node",
    RdmaPort: "RDMA port",
    TransferOrder: "Order for a transfer",
    TransferResult: "Result of a transfer",
}
_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean"}
# The meanings of fields of classes that are not messages.
_MEANINGS: dict[type, dict[str, str]] = {
    Plan: {
        "service": "its name",
        "model": "the model as written in the topology",
        "model_path": "the path of the model, which may not exist yet",
        "model_ready": "whether the model exists there already",
        "served_model_name": "the model's name for clients",
        "max_model_len": "maximum tokens, prompt and output together",
        "proxy": "the `[proxy]` table, see [its keys](reference/topology.md#proxy)",
        "ttft_ms": "target for the TTFT, in milliseconds",
        "tpot_ms": "target for the TPOT, in milliseconds",
        "proxy_url": "the address for clients",
        "run_dir": "its run directory",
        "log_dir": "the directory of its logs and events",
        "supervision": "the `[supervisor]` table, see [its keys](reference/topology.md#supervisor)",
        "processes": "in the order of their start",
        "attached": "engines that pdctl uses but does not start",
        "source": "the topology file, or empty for the built-in default",
        "text": "the content of the topology file",
        "lease_s": "seconds without a renewal after which prefill frees the KV of a hand-over",
        "elastic": "the `[elastic]` table, see [its keys](reference/topology.md#elastic)",
        "dashboard": "the `[dashboard]` table, see [its keys](reference/topology.md#dashboard)",
        "node": "of a cluster, the node that runs this plan; else empty",
        "certificates": "of a cluster, the folder with this node's certificates; else empty",
    },
    ProcessSpec: {
        "name": "such as `prefill-0`",
        "kind": "such as `builtin` or `mooncake`; `command` for `[[processes]]`; for the proxy, `proxy`",
        "role": "`prefill`, `decode` or `hybrid`; else `store`, `command` or `proxy`",
        "argv": "its command line",
        "env": "variables added to the supervisor's environment",
        "device": "`cpu` or `cuda`",
        "cpus": "CPUs it is pinned to",
        "gpus": "UUIDs of the GPUs it is pinned to",
        "host": "the address at which other processes reach its ports",
        "ports": "ports by purpose",
        "depends_on": "processes that must be ready before it starts",
        "probe": "its readiness and liveness probes",
        "listen": "host and port that the supervisor binds for it, or null",
        "group": "the `[[engines]]` entry that it is a replica of; else its name; for the proxy, `proxy`",
        "restart_with": "processes whose exit also restarts this one",
        "rdma": "RDMA devices it is pinned to",
        "why": "the reason for each choice, by field",
        "api_key_env": "variable in which it gets the run's secret as its API key, or empty",
        "connector": "how an engine exchanges KV, or empty",
        "kv_events": "where an engine of another kind publishes which blocks can be found, and replays that, or null",
        "files": "files that are written before its start: content by path",
        "inline": "whether it also takes whole requests as a decode engine",
        "switches": "whether its role can change while it runs",
        "planned_role": "its role in the topology, if it has another one now, else empty",
        "role_epoch": "counts the changes of its role",
        "tls": "of a cluster: its ports want certificates",
        "slots": "connections of clients that outlive a proxy; 0: none",
        "fetches": "whether it fetches beginnings of prompts from other engines",
        "version": "of pdctl, for its own engines and proxies; else empty",
    },
    Probe: {
        "ready": "readiness probe: `tcp:HOST:PORT`, `http://...`, `log:PATTERN`, or empty if ready at once",
        "alive": "address of the liveness probe, or empty",
        "state": "address where an engine reports its requests and tokens, or empty",
        "generate": "address for a request of one token, or empty",
        "generate_body": "the body of that request, JSON",
        "ready_generates": "whether it is ready only once it has answered that request",
        "interval_s": "seconds between two probes",
        "timeout_s": "timeout of one probe in seconds",
        "startup_s": "seconds within which it must be ready",
    },
    Attached: {
        "name": "the name of its `[[engines]]` entry",
        "role": "`prefill`, `decode` or `hybrid`",
        "kind": "such as `vllm`",
        "host": "host on which it listens",
        "port": "port on which it listens",
        "secret_file": "the file with its key, or empty",
        "ports": "those beside its API, by purpose",
        "connector": "how it exchanges KV, or empty",
    },
    Changes: {
        "added": "processes that are started",
        "removed": "processes that are drained and stopped",
        "restarted": "processes that are restarted, each with the reason",
        "live": "processes that change without a restart, each with what changes; `pdctl` is the supervisor",
        "unchanged": "processes that do not change",
    },
}

_HEAD = """\
`scripts/status-json` generates this page from `pdctl/control_api/messages.py`; change it there.

Fields are added, not renamed or removed. Times ending in `_s` are seconds."""
_EVENTS = """\
One object per line. In addition to these fields, it has fields that depend on the event, such as `pid` and `epoch` for
`started`, `after_s` for `ready`, and the fields of a [last exit](#last-exit) for `exited`."""
_EVENT_NAMES = """\
Events: `started`, `phase` (of a start), `ready`, `exited`, `failed`, `not_alive`, `blocked`, `draining`, `drained`,
`drain_over`, `elastic` (a decision about roles), `role_changed`, `role_done`, `role_drain_over`, `stopped`, `adopted`,
`asked`, `restarted_with`, `dashboard` (the live page opens, or cannot), `apply`, `apply_failed`, `upgrade`,
`upgrade_failed`, `service_ready`,
`run_dir_restored`, `no_log`, `shared_memory` (removed after a killed engine), `took_over` (a proxy goes on
with the connections of another), `note`. Of engines that register themselves: `node_added`, `node_answers`,
`node_silent`, `node_leaving`, `node_removed`, `node_lost` (forgotten, because it did not answer)."""
_API = """\
HTTP on the unix socket `control.sock` in the run directory, only for the service's user and root. In Python,
`pdctl.control_api.ControlClient(run_dir)` has a method for each call."""
_CALLS = (
    ("GET /v1/status", "as `pdctl status --json`; with `?measurements=0` at once, without measurements"),
    ("GET /v1/plan", "as `pdctl plan --json`: the running plan"),
    ("GET /v1/exits", "`exits`: as `pdctl why --json`, for all processes, the last 200 of this run"),
    ("GET /v1/events", "[a stream](#events-as-a-stream)"),
    ("GET /v1/logs", "the [logs](#logs) that there are"),
    (
        "GET /v1/logs/NAME",
        "a [piece of a log](#piece-of-a-log): with `?after=PLACE` what follows, with `?last=N` the last N bytes, with "
        "`?previous=1` also earlier starts",
    ),
    ("GET /v1/keys", "as `pdctl status --keys --json`"),
    ("GET /v1/kv", "as `pdctl kv --json`"),
    ("POST /v1/kv/revoke?lease=ID", "[reply](#reply); its status is always 200"),
    ("GET /v1/nodes", "`nodes`: the [registered engines](#registered-engine), without those that are leaving"),
    ("POST /v1/nodes/add", "the body is a [registration](#registration); [reply](#reply)"),
    ("POST /v1/nodes/remove?name=HOST:PORT", "[reply](#reply), once its drain has begun"),
    ("POST /v1/processes/NAME/VERB", "[reply](#reply), once started; with `?drain=1`, requests finish first"),
    (
        "POST /v1/processes/NAME/role",
        "the body is a [change of a role](#change-of-a-role); [reply](#reply), once begun",
    ),
    (
        "POST /v1/dashboard",
        "the body is an [order for the live page](#order-for-the-live-page); [reply](#reply), with the field `url`",
    ),
    ("POST /v1/apply", "the body is a plan; [reply](#reply), once started"),
    ("POST /v1/apply?dry_run=1", "the body is a plan; as `pdctl apply --dry-run --json`"),
    (
        "POST /v1/upgrade",
        "the body is an [order to upgrade](#order-to-upgrade); [reply](#reply), after a trial of that version: "
        "at most 30 s. Then it does not answer until it is the new version's",
    ),
    ("GET /v1/cluster/topology", "a [published topology](#published-topology)"),
    (
        "POST /v1/cluster/topology",
        "the body is an [order for a topology](#order-for-a-topology); "
        "[its reply](#reply-to-an-order-for-a-topology), once published",
    ),
    ("DELETE /v1/cluster/topology", "[reply](#reply), once no topology is published"),
    (
        "POST /v1/doctor",
        "in a cluster; the body is an [order to examine all nodes](#order-to-examine-all-nodes); "
        "[their reports](#examination-of-all-nodes)",
    ),
    (
        "POST /v1/doctor/transfer",
        "in a cluster; the body is an [order for a transfer](#order-for-a-transfer); "
        "[its result](#result-of-a-transfer)",
    ),
    ("POST /v1/stop", f"`{msgspec.json.encode(Stopping()).decode()}`; a second call kills the remaining processes"),
)
_CLUSTER = """\
In a cluster, the supervisor of each node answers for all nodes, and NAME may be NODE/NAME. A node that does not answer
within two seconds is `silent` in `nodes`, and its part is missing. Without a cluster, the calls of `/v1/cluster` are
refused; in one, `/v1/apply` is. Agents make the calls for status, exits, events, keys, KV and processes to each other,
over TCP with the cluster's secret as bearer token, and further ones: `/v1/cluster/changes` says what an order would
change there, `/v1/cluster/spent` what API keys used there, `/v1/cluster/calls` how many calls its proxies have at an
engine, `/v1/cluster/clock` the time there; `/v1/cluster/doctor` and `/v1/cluster/transfer` are a node's part of the
doctor's calls."""
_REFUSED = f"""\
VERB is one of {", ".join(f"`{verb}`" for verb in get_args(Verb))}. A refused call has status 409, and one with an
invalid cursor status 400. Both have a [reply](#reply) with the reason."""
_STREAM = f"""\
Server-sent events. `data` is a line of `pdctl events`, `id` the cursor of that event. The stream starts with the oldest
kept event, which may be from an earlier run. With `?after=CURSOR`, or with the cursor in the header `Last-Event-ID`, it
starts after that event or, if that event is no longer kept, with the oldest kept one. New events follow, but not with
`?follow=0`. In a cluster, the events of all nodes are merged by time, and a cursor names the place in each. After
{HEARTBEAT_S:g} seconds without an event, the stream sends a comment.

The stream ends when the service is down. It also ends for a reader that lags by more than {MOST_WAITING:,} events; the
cursor of the last event resumes it."""


def text() -> str:
    """The whole page."""
    parts = [
        "# JSON that scripts may rely on",
        _HEAD,
        "## `pdctl status --json`",
        _table(MeasuredStatus),
        f"These fields of a process are measurements, null if unknown: {_names(MeasuredProcess, ProcessStatus)}.",
        "Without a running service, the exit code is 1 and stdout is empty.",
        *_sections(
            MeasuredProcess, StepLatency, StepPredictions, LastExit, Takeover, Link, AttachedStatus, ApplyProgress
        ),
        *_sections(ClusterNode, RegistryStatus),
        "## `pdctl status --keys --json`",
        "See [API keys](keys.md).",
        _table(KeysStatus),
        *_sections(KeyStatus),
        "## `pdctl kv --json`",
        "See [kv](kv.md) for the meaning.",
        _table(KvStatus),
        *_sections(EngineBlocks, Lease),
        "## `pdctl doctor transfer --json`",
        "See [transports](transports.md).",
        "## `pdctl plan --json`",
        _table(Plan),
        "A plan does not contain the run's secret.",
        *_sections(ProcessSpec, Probe, Attached),
        "## `pdctl apply --dry-run --json`, `pdctl scale --dry-run --json`",
        _table(Changes),
        "`pdctl upgrade --json` has the same, and the versions `from` and `to`.",
        "## `pdctl events`",
        _EVENTS,
        _table(Event, but=("cursor", "detail")),
        _EVENT_NAMES,
        "## `pdctl why --json`",
        "A list of the last exits, oldest first. Each has:",
        _table(ExitReport),
        *_sections(ResourceUse),
        "## The control API",
        _API,
        "\n".join(["| call | answer |", "|---|---|", *(f"| `{call}` | {answer} |" for call, answer in _CALLS)]),
        _REFUSED,
        _CLUSTER,
        *_sections(RoleOrder, UpgradeOrder, DashboardOrder, Node, NodeStatus, Reply),
        *_sections(LogNames, LogPart),
        *_sections(PublishedTopology, TopologyOrder, TopologyReply, NodeChanges),
        *_sections(ExamineOrder, ClusterExamination, NodeExamination, NodeReport, NodeFinding, NodeTraits, RdmaPort),
        *_sections(TransferOrder, TransferResult),
        "### Events as a stream",
        _STREAM,
    ]
    return "\n\n".join(map(_wrapped, parts)) + "\n"


def _wrapped(part: str) -> str:
    if part.startswith(("|", "#")):
        return part
    paragraphs = part.split("\n\n")
    return "\n\n".join(textwrap.fill(p, 120, break_long_words=False, break_on_hyphens=False) for p in paragraphs)


def _sections(*kinds: type) -> list[str]:
    return [part for kind in kinds for part in (f"### {_SECTIONS[kind]}", _table(kind))]


def _table(kind: type, but: Sequence[str] = ()) -> str:
    rows = [f"| `{name}` | {_worded(hint)} | {says} |" for name, hint, says in _fields(kind) if name not in but]
    return "\n".join(["| field | type | meaning |", "|---|---|---|", *rows])


def _fields(kind: type) -> list[tuple[str, object, str]]:
    """Name, type and meaning of each field, in order."""
    found: list[tuple[str, object, str]] = []
    for name, hint in get_type_hints(kind, include_extras=True).items():
        # Messages have the meaning of each field in its annotation; other classes have it in _MEANINGS.
        if get_origin(hint) is Annotated:
            bare, meta = get_args(hint)
            assert isinstance(meta, msgspec.Meta)
            found.append((name, bare, meta.description or ""))
        else:
            found.append((name, hint, _MEANINGS[kind][name]))
    return found


def _names(kind: type, but: type) -> str:
    """The names of the fields that only the first class has, as text."""
    names = [f"`{name}`" for name in get_type_hints(kind) if name not in get_type_hints(but)]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _worded(hint: object, plural: str = "") -> str:
    """A type in JSON's terms."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if one is type(None) else _worded(one) for one in arguments)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments[:-1]) + f" or `{arguments[-1]}`"
    if origin is tuple and arguments[-1] is not ...:
        return f"list of {' and '.join(map(_worded, arguments))}"
    if origin is tuple:
        return f"list of {_worded(arguments[0], 's')}"
    if origin is dict:
        return f"object of {_worded(arguments[1], 's')}"
    if hint in (Proxy, Supervision, Elastic, Dashboard, msgspec.Raw):
        return "object"
    assert isinstance(hint, type)
    if hint is Endpoints:
        return "list of two addresses"
    if hint in _SECTIONS:
        heading = _SECTIONS[hint]
        return f"[{heading.lower()}](#{heading.lower().replace(' ', '-')})"
    return _PLAIN[hint] + plural


def main(arguments: Sequence[str]) -> None:
    """Write the page to the given file."""
    (path,) = arguments
    Path(path).write_text(text())


if __name__ == "__main__":
    main(sys.argv[1:])
