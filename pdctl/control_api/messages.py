"""Answers of the control API, which `--json` also prints. docs/status-json.md is generated from this file and from
`cluster_messages.py` and `usage_messages.py`.

Fields are added, not renamed or removed. A new field must have a default: the supervisor may be older than the command
that calls it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from pdctl.control_api.cluster_messages import ClusterNode, NodeChanges, RegistryStatus
from pdctl.control_api.meanings import says
from pdctl.net import LOOPBACK_PORT
from pdctl.topology.spec import ENGINE_ROLES

# Maximum silence of an event stream, seconds: then it sends a comment.
HEARTBEAT_S = 15.0
# If a reader lags by more events than this, its stream ends. It can resume with its cursor.
MOST_WAITING = 1000

ServiceState = Literal["starting", "ready", "degraded", "failed", "stopping", "empty"]
ProcessState = Literal[
    "pending", "starting", "ready", "draining", "drained", "stopping", "clearing", "backoff", "stopped", "failed"
]
ApplyState = Literal["running", "done", "failed"]
Verb = Literal["start", "stop", "restart", "drain"]
RoleName = Literal["prefill", "decode", "hybrid"]


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the supervisor accepted a call."""

    ok: Annotated[bool, says("whether the action is done or started")]
    reason: Annotated[str, says("why not, else empty")] = ""
    hint: Annotated[str, says("what to do then, or empty")] = ""


class TopologyReply(Reply, frozen=True, kw_only=True):
    """What a topology changes in a cluster."""

    revision: Annotated[int, says("its revision in the registry; 0 if it was not published")] = 0
    nodes: Annotated[tuple[NodeChanges, ...], says("what changes on each node")] = ()


class Stopping(msgspec.Struct, frozen=True, kw_only=True):
    """The service stops. A second call kills the remaining processes."""

    stopping: Annotated[bool, says("always true")] = True


class LastExit(msgspec.Struct, frozen=True, kw_only=True):
    """How a process ended, as a summary."""

    at: Annotated[str, says("time, ISO 8601")]
    code: Annotated[int | None, says("exit code; null after a signal, or if unknown")]
    signal: Annotated[str | None, says("such as `SIGKILL`; null after an exit code, or if unknown")]
    reason: Annotated[str, says("the reason as text")]
    expected: Annotated[bool, says("whether pdctl was stopping it")]
    by: Annotated[str, says("what ended it: itself, pdctl, the kernel or another process")]
    oom: Annotated[bool, says("whether the kernel killed it because memory was exhausted")]


class ResourceUse(msgspec.Struct, frozen=True, kw_only=True):
    """The resources that a process used in its lifetime, as counted by the kernel."""

    max_rss_bytes: Annotated[int, says("peak resident memory")]
    user_s: Annotated[float, says("CPU seconds in user mode")]
    system_s: Annotated[float, says("CPU seconds in the kernel")]
    major_faults: Annotated[int, says("page faults that read from disk")]


class ExitReport(LastExit, frozen=True, kw_only=True):
    """Everything known about the end of a process."""

    process: Annotated[str, says("its name")]
    pid: Annotated[int, says("its process id")]
    epoch: Annotated[str, says("identifies this start of the process")]
    lived_s: Annotated[float, says("seconds from its start to its end")]
    core_dumped: Annotated[bool, says("whether it left a core dump")]
    rusage: Annotated[ResourceUse | None, says("the resources it used; null if unknown")]
    log: Annotated[str, says("its log file")]
    last_lines: Annotated[tuple[str, ...], says("the end of its log, at most 50 lines")]
    kernel: Annotated[tuple[str, ...], says("relevant lines of the kernel log within ten seconds")]
    node: Annotated[str, says("the node of a cluster on which it ran, else empty")] = ""


class Exits(msgspec.Struct, frozen=True, kw_only=True):
    """The last exits of this run, oldest first, at most 200."""

    exits: Annotated[tuple[ExitReport, ...], says("oldest first")]


class RoleOrder(msgspec.Struct, frozen=True, kw_only=True):
    """A running engine is to have another role."""

    role: Annotated[RoleName, says("its role from now on")]
    drain_s: Annotated[
        float | None, says("answers that run longer go on at other engines, seconds; null: `supervisor.drain_s`")
    ] = None
    dry_run: Annotated[bool, says("only say whether it is possible")] = False


class UpgradeOrder(msgspec.Struct, frozen=True):
    """The supervisor is to become another version of pdctl."""

    program: Annotated[tuple[str, ...], says("the command line of that version's supervisor")]
    plan: Annotated[msgspec.Raw, says("the plan that it applies, as that version writes it")]


class Takeover(msgspec.Struct, frozen=True, kw_only=True):
    """Clients' connections that outlive a proxy, since the supervisor's start."""

    slots: Annotated[int, says("connections that can, at once")]
    kept: Annotated[int, says("connections that would, now")]
    uncovered: Annotated[int, says("connections that found no slot")]
    takeovers: Annotated[int, says("times that a proxy went on with the connections of another")]
    connections: Annotated[int, says("connections that went on")]
    resumed: Annotated[int, says("answers that went on in the middle")]
    repeated: Annotated[int, says("requests that began again, because their clients had nothing of an answer yet")]
    cut: Annotated[int, says("connections that could not go on")]
    resent_bytes: Annotated[int, says("bytes that were sent for another proxy")]


class ProcessStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One process, without measurements."""

    name: Annotated[str, says("such as `prefill-0`")]
    kind: Annotated[str, says("such as `builtin` or `mooncake`; `command` for `[[processes]]`; for the proxy, `proxy`")]
    role: Annotated[str, says("`prefill`, `decode` or `hybrid`; else `store`, `command` or `proxy`")]
    group: Annotated[str, says("the `[[engines]]` entry it is a replica of; else its name; for the proxy, `proxy`")]
    state: Annotated[ProcessState, says("its lifecycle state")]
    reason: Annotated[str, says("why it is in `backoff`, `clearing` or `failed`, else empty")]
    pid: Annotated[int | None, says("null if it is not running")]
    restarts: Annotated[int, says("number of starts after the first")]
    last_exit: Annotated[LastExit | None, says("how it last ended; null if it never did")]
    device: Annotated[str, says("`cpu` or `cuda`")]
    cpus: Annotated[tuple[int, ...], says("CPUs it is pinned to")]
    gpus: Annotated[tuple[str, ...], says("UUIDs of the GPUs it is pinned to")]
    rdma: Annotated[tuple[str, ...], says("RDMA devices it is pinned to")]
    ports: Annotated[dict[str, int], says("ports by purpose")]
    ready_since: Annotated[str | None, says("ISO 8601; null if it is not ready")]
    epoch: Annotated[str, says("identifies this start of the process")]
    adopted: Annotated[bool, says("whether an earlier supervisor started it")]
    log: Annotated[str, says("its log file")]
    phase: Annotated[str, says("while it starts: the phase that its log shows, such as `loading weights`, else empty")]
    phase_s: Annotated[float | None, says("how long that phase has lasted, seconds; null without a phase")]
    planned_role: Annotated[str, says("its role in the topology, if it has another one now, else empty")] = ""
    leaving_role: Annotated[str, says("the role whose last work it still does after a change, else empty")] = ""
    node: Annotated[str, says("the node of a cluster on which it runs, else empty")] = ""
    takeover: Annotated[Takeover | None, says("of a proxy whose clients' connections outlive it; else null")] = None

    @property
    def is_engine(self) -> bool:
        """Whether it computes requests."""
        return self.role in ENGINE_ROLES


class StepPredictions(msgspec.Struct, frozen=True, kw_only=True):
    """How well an engine predicted its steps of one kind, since its start."""

    kind: Annotated[str, says("`prefill`, `decode` or `mixed`")]
    steps: Annotated[int, says("their number")]
    actual_s: Annotated[float, says("seconds that they took")]
    predicted_s: Annotated[float, says("seconds that were predicted, each before its step")]
    mean_error: Annotated[float, says("mean of |predicted / actual - 1|; 0 without steps")]


class StepLatency(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's latency model: a step takes the sum of `coefficients` times 1, tokens, attention, sequences and
    context (docs/scheduling.md)."""

    coefficients: Annotated[tuple[float, float, float, float, float], says("seconds")]
    corrections: Annotated[tuple[float, float, float], says("factors for prefill, decode and mixed steps, now")]
    slow: Annotated[float, says("90th percentile of actual divided by predicted seconds")]
    predictions: Annotated[tuple[StepPredictions, ...], says("by kind of step")]


class MeasuredProcess(ProcessStatus, frozen=True, kw_only=True):
    """One process. Measurements are null if unknown."""

    rss_bytes: Annotated[int | None, says("memory of the process and its descendants")]
    cpu_percent: Annotated[float | None, says("their CPU use since the last measurement, 100 is one core")]
    gpu_memory_bytes: Annotated[int | None, says("memory on its GPUs, if the driver reports it")]
    running: Annotated[int | None, says("requests that the engine computes; null if it does not answer")]
    waiting: Annotated[int | None, says("requests that wait in the engine")]
    kv_used: Annotated[float | None, says("fraction of the engine's KV blocks in use, from 0 to 1")]
    leases: Annotated[int | None, says("live leases that the engine has granted")]
    tokens_per_s: Annotated[float | None, says("tokens per second since the last measurement")]
    leaving_work: Annotated[int | None, says("requests that are left of `leaving_role`; null without one")] = None
    prompts_own: Annotated[int | None, says("prompts that it computed for its own answers, since its start")] = None
    latency: Annotated[StepLatency | None, says("how it predicts its steps; null if it does not")] = None
    prompts_received: Annotated[int | None, says("those whose KV came from a prefill engine")] = None
    attention: Annotated[str | None, says("how a builtin engine computes attention, and why; null if unknown")] = None
    cuda_graphs: Annotated[str | None, says("its decode steps that are CUDA graphs, or why none is; null on a CPU")] = (
        None
    )
    prefix_hit_rate: Annotated[
        float | None,
        says("part of the prompts' tokens whose KV was there already, since its start; null without prompts"),
    ] = None


class AttachedStatus(msgspec.Struct, frozen=True, kw_only=True):
    """An engine that pdctl uses but does not start."""

    name: Annotated[str, says("the name of its `[[engines]]` entry; HOST:PORT if it registered itself")]
    role: Annotated[str, says("`prefill`, `decode` or `hybrid`")]
    kind: Annotated[str, says("such as `vllm`")]
    host: Annotated[str, says("host on which it listens")]
    port: Annotated[int, says("port on which it listens")]
    secret_file: Annotated[str, says("the file with its key, or empty")]
    ports: Annotated[dict[str, int], says("its ports beside its API, by purpose")] = {}
    connector: Annotated[str, says("how it exchanges KV, or empty")] = ""
    answers: Annotated[bool | None, says("result of its last health check; null before the first one")]
    registered: Annotated[bool, says("whether it registered itself, at the proxy")] = False
    leaving: Annotated[bool, says("whether it was removed, and its last requests still run")] = False


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """An engine that registers itself."""

    kind: Annotated[str, says("the engine kind; today always `lmdeploy`")]
    role: Annotated[RoleName, says("the work that it accepts")]
    host: Annotated[str, msgspec.Meta(min_length=1, max_length=253, description="host on which it listens")]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535, description="port on which it listens")]
    models: Annotated[tuple[str, ...], msgspec.Meta(max_length=64, description="models that it serves")]
    speed: Annotated[int | None, says("as it was registered; pdctl measures speed itself")] = None

    @property
    def name(self) -> str:
        """Its name as an engine of the service. A topology's names have no colon."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://{self.name}"


class NodeStatus(Node, frozen=True, kw_only=True):
    """An engine that registered itself, and its load."""

    unfinished: Annotated[int, says("calls that run there now")] = 0
    latency: Annotated[tuple[float, ...], says("durations of its last answered calls, seconds")] = ()


class Nodes(msgspec.Struct, frozen=True, kw_only=True):
    """The engines that registered themselves, without those that are leaving."""

    nodes: Annotated[tuple[NodeStatus, ...], says("in the order of their registration")]


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A link: how KV moves from one engine to another."""

    reader: Annotated[str, says("the engine that reads KV")]
    peer: Annotated[str, says("the prefill engine that KV comes from")]
    epoch: Annotated[str, says("the start of the peer that the link belongs to")]
    transport: Annotated[str, says("such as `shm`; empty if there is no link")]
    protocol: Annotated[str, says("the protocol that carries the bytes, such as `tcp`; empty if there is no link")]
    reason: Annotated[str, says("why this transport, or empty")]
    fallback: Annotated[str, says("why the configured protocol is not used, or empty")]
    error: Annotated[str, says("why there is no link, or empty")]
    refused: Annotated[bool, says("true if the peer's KV can never be used (another model or layout)")]
    pulls: Annotated[int, says("transfers so far")]
    bytes: Annotated[int, says("bytes moved so far")]
    gbps: Annotated[float, says("10^9 bytes per second over the last 16 transfers; 0 before the first")]


class ApplyProgress(msgspec.Struct, frozen=True, kw_only=True):
    """The last apply."""

    state: Annotated[ApplyState, says("whether it is running, or how it ended")]
    step: Annotated[str, says("the current step, or empty")]
    error: Annotated[str, says("why it failed, or empty")]


class ServiceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A service and its processes, without measurements."""

    service: Annotated[str, says("its name")]
    state: Annotated[
        ServiceState, says("`degraded`: it was ready, but a process is not now; `empty`: a cluster without a topology")
    ]
    failure: Annotated[str | None, says("why the start failed, or null")]
    proxy_url: Annotated[str, says("the address for clients")]
    model: Annotated[str, says("the model as written in the topology")]
    served_model_name: Annotated[str, says("the model's name for clients")]
    tls_cert: Annotated[str, says("the proxy's certificate file, or empty")]
    supervisor_pid: Annotated[int, says("the supervisor's process id")]
    run_dir: Annotated[str, says("its run directory")]
    log_dir: Annotated[str, says("the directory of its logs and events")]
    source: Annotated[str, says("the topology file, or empty for the built-in default")]
    trees: Annotated[str, says("how process trees are ended: `cgroup` or `sweep`")]
    apply: Annotated[ApplyProgress | None, says("the last apply; null if there was none")]
    processes: Annotated[tuple[ProcessStatus, ...], says("in the order of the plan")]
    attached: Annotated[tuple[AttachedStatus, ...], says("engines that pdctl uses but does not start")]
    links: Annotated[tuple[Link, ...], says("how KV moves between engines")]
    nodes: Annotated[tuple[ClusterNode, ...], says("the machines of a cluster; empty without one")] = ()
    registry: Annotated[RegistryStatus | None, says("of a cluster; null without one")] = None
    proxy_urls: Annotated[tuple[str, ...], says("the addresses for clients on all nodes of a cluster")] = ()
    unplaced: Annotated[tuple[str, ...], says("engines of a cluster that no node runs")] = ()
    refused: Annotated[str, says("why nodes of a cluster do not carry out what they are to run, or empty")] = ""
    supervisor_epoch: Annotated[str, says("another one after each start of a supervisor, and after an upgrade")] = ""
    version: Annotated[str, says("the supervisor's version of pdctl")] = ""

    def process(self, name: str) -> ProcessStatus | None:
        """The process of that name."""
        return next((process for process in self.processes if process.name == name), None)


class MeasuredStatus(ServiceStatus, frozen=True, kw_only=True):
    """A service and its processes, with measurements."""

    processes: Annotated[tuple[MeasuredProcess, ...], says("in the order of the plan")]

    def process(self, name: str) -> MeasuredProcess | None:
        """The process of that name."""
        return next((process for process in self.processes if process.name == name), None)


class DashboardOrder(msgspec.Struct, frozen=True, kw_only=True):
    """Open the live page, or close it."""

    listen: Annotated[
        str,
        msgspec.Meta(
            pattern=f"^({LOOPBACK_PORT})?$",
            description="a loopback address such as `127.0.0.1:8099`; empty: as configured, else one that is free",
        ),
    ] = ""
    write: Annotated[bool, says("whether the link may change the service")] = False
    stop: Annotated[bool, says("close the page")] = False


class DashboardReply(Reply, frozen=True, kw_only=True):
    """Where the live page is."""

    url: Annotated[str, says("the link with its token; empty if the page is closed")] = ""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One event. `detail`: fields that depend on the event, such as `pid`, or how a process ended."""

    cursor: Annotated[str, says("its position in the journal")]
    at: Annotated[str, says("time, ISO 8601")]
    process: Annotated[str, says("the process, or `pdctl` for the service as a whole")]
    event: Annotated[str, says("the kind of event")]
    message: Annotated[str, says("the event as text")]
    detail: Annotated[dict[str, object], says("fields that depend on the event")] = {}
    node: Annotated[str, says("in a cluster, the node on which it happened; else not there")] = ""
