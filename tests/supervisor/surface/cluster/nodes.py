"""Nodes of a cluster that run nothing: each with a real agent's server on an address of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
from starlette.routing import Route

from pdctl.control_api import (
    DashboardOrder,
    DashboardReply,
    ExitReport,
    KeysStatus,
    KeyStatus,
    KvStatus,
    Lease,
    MeasuredProcess,
    MeasuredStatus,
    Node,
    Nodes,
    ProcessState,
    ProcessStatus,
    PublishedTopology,
    RegistryStatus,
    RoleOrder,
    ServiceState,
    ServiceStatus,
    UpgradeOrder,
    Verb,
)
from pdctl.errors import PdctlError
from pdctl.plan import Plan
from pdctl.plan.changes import Changes
from pdctl.supervisor.cluster.entries import Order, TopologyEntry
from pdctl.supervisor.rundir.journal import Journal
from pdctl.supervisor.surface.cluster.agents import AgentAddress
from pdctl.supervisor.surface.cluster.control import ClusterControl
from pdctl.supervisor.surface.cluster.merge import ClusterFacts
from pdctl.supervisor.surface.cluster.server import serve_agents
from pdctl.wire import LeaseReply
from tests.service import free_port
from tests.supervisor.fleet import plan_of

SECRET = "of all nodes"


def process(name: str, role: str = "decode", state: ProcessState = "ready") -> MeasuredProcess:
    plain = ProcessStatus(
        name=name, kind="proxy" if role == "proxy" else "builtin", role=role, group=name.rpartition("-")[0] or name,
        state=state, reason="", pid=7, restarts=0, last_exit=None, device="cpu", cpus=(0,), gpus=(), rdma=(),
        ports={"http": 18100}, ready_since=None, epoch="0-1", adopted=False, log=f"/{name}.log", phase="", phase_s=None,
    )  # fmt: skip
    return MeasuredProcess(
        **msgspec.structs.asdict(plain), rss_bytes=1, cpu_percent=None, gpu_memory_bytes=None, running=2, waiting=0,
        kv_used=0.5, leases=None, tokens_per_s=1.5,
    )  # fmt: skip


def exit_of(name: str, at: str) -> ExitReport:
    return ExitReport(
        process=name, pid=7, epoch="0-1", lived_s=1.0, core_dumped=False, rusage=None, log="", last_lines=(), kernel=(),
        at=at, code=1, signal=None, reason="exit code 1", expected=False, by="itself", oom=False,
    )  # fmt: skip


def lease(name: str) -> Lease:
    return Lease(
        id=name, request_id="r", holder="proxy@1", state="held", age_s=1.0, quiet_s=0.5, blocks=1, bytes=2, leak="",
        engine="prefill-0",
    )  # fmt: skip


def key(requests: int, ttft_s: float | None, left: int | None) -> KeyStatus:
    return KeyStatus(
        name="team", weight=1.0, priority=0, running=1, waiting=0, requests=requests, refused=0, prompt_tokens=10,
        cached_tokens=0, output_tokens=5, queue_s=0.0, ttft_s=ttft_s, requests_per_minute=9, requests_left=left,
        tokens_per_minute=None, tokens_left=None, streams=None,
    )  # fmt: skip


class Part:
    """What one node runs, and what was asked of it."""

    def __init__(self, folder: Path, node: str, address: str, *processes: MeasuredProcess) -> None:
        self.node = node
        self.plan = plan_of(folder / node)
        self.journal = Journal(folder / node / "logs", lambda name, message: None)
        self.processes = processes
        self.word: ServiceState = "ready"
        self.reports: tuple[ExitReport, ...] = ()
        self.lease_ids: list[str] = []
        self.key_use: KeyStatus = key(1, 1.0, 3)
        self.asked: list[str] = []
        self.agent = AgentAddress(node, address, free_port(), version="9.9")

    def status(self) -> ServiceStatus:
        found = msgspec.structs.asdict(self._status())
        plain = [msgspec.convert(msgspec.to_builtins(one), ProcessStatus) for one in self.processes]
        return ServiceStatus(**(found | {"processes": tuple(plain)}))

    async def fresh_status(self) -> MeasuredStatus:
        return self._status()

    def exits(self) -> tuple[ExitReport, ...]:
        return self.reports

    async def keys(self) -> KeysStatus:
        return KeysStatus(keys=(self.key_use,))

    async def leases(self) -> KvStatus:
        return KvStatus(engines=(), leases=tuple(map(lease, self.lease_ids)), unreachable={})

    async def revoke(self, lease_id: str) -> LeaseReply:
        if lease_id not in self.lease_ids:
            return LeaseReply(False, f"no running engine granted lease {lease_id}")
        self.lease_ids.remove(lease_id)
        return LeaseReply(True)

    def ask(self, name: str, verb: Verb, drain: bool) -> str:
        if name not in {process.name for process in self.processes}:
            return f"no process {name!r}"
        self.asked.append(f"{verb} {name}{', drained' if drain else ''}")
        return ""

    def change_role(self, name: str, call: RoleOrder) -> str:
        if call.role == "hybrid":
            return f"{name} stays what it is"
        self.asked.append(f"{name} to {call.role}")
        return ""

    async def nodes(self) -> Nodes:
        return Nodes(nodes=())

    def add_node(self, node: Node) -> str:
        return "none is taken"

    def remove_node(self, name: str) -> str:
        return f"no engine at {name}"

    def show(self, order: DashboardOrder) -> DashboardReply:
        return DashboardReply(ok=True, url="http://here")

    def changes(self, wanted: Plan) -> Changes:
        return Changes()

    def apply(self, wanted: Plan) -> str:
        return ""

    async def upgrade(self, order: UpgradeOrder) -> str:
        raise AssertionError("not asked for")

    def stop(self) -> None:
        self.asked.append("stop")

    def _status(self) -> MeasuredStatus:
        return MeasuredStatus(
            service="fleet", state=self.word, failure=None, proxy_url=f"http://{self.agent.host}:8000", model="m",
            served_model_name="m", tls_cert="", supervisor_pid=1, run_dir="/r", log_dir="/l", source="",
            trees="sweep", apply=None, processes=self.processes, attached=(), links=(),
        )  # fmt: skip


class Published:
    """A registry's topology. Every node is to run the words of the text."""

    def __init__(self, nodes: tuple[str, ...]) -> None:
        self.nodes = nodes
        self.now = PublishedTopology(text="", source="", revision=0)

    async def topology(self) -> PublishedTopology:
        return self.now

    async def orders(self, text: str, source: str) -> tuple[Order, ...]:
        if "[" in text:
            raise PdctlError("no node has room", "add a node")
        return tuple(Order(1, node, TopologyEntry(text, source), tuple(text.split())) for node in self.nodes)

    async def publish(self, text: str, source: str, revision: int | None) -> int:
        if revision not in (None, self.now.revision):
            raise PdctlError(f"revision {self.now.revision} is published, not {revision}", "look again")
        self.now = PublishedTopology(text=text, source=source, revision=self.now.revision + 1)
        return self.now.revision

    async def withdraw(self) -> None:
        self.now = PublishedTopology(text="", source="", revision=self.now.revision + 1)

    async def preview(self, order: Order) -> Changes:
        if "impossible" in order.engines:
            raise PdctlError("this node has no such engine")
        return Changes(added=order.engines)


class Cluster:
    """`here`: the node that is asked."""

    def __init__(self, here: Part, others: tuple[Part, ...], secret: str = SECRET) -> None:
        self.here = here
        self.parts = {part.node: part for part in (here, *others)}
        self.known = [part.agent for part in others]
        self.facts = ClusterFacts(RegistryStatus(ok=True), "a")
        self.published = Published(tuple(self.parts))
        self.control = ClusterControl(here, here.agent, lambda: self.known, secret, lambda: self.facts, self.published)
        self.serving: dict[str, asyncio.Task[None]] = {}
        # Further calls that a node's agent answers.
        self.more: dict[str, list[Route]] = {}

    async def end(self, node: str) -> None:
        """The agent of a node ends."""
        self.serving[node].cancel()
        await asyncio.wait([self.serving[node]])


@asynccontextmanager
async def cluster(here: Part, *others: Part, secret: str = SECRET) -> AsyncIterator[Cluster]:
    """A cluster whose other nodes have `SECRET`, and this one `secret`."""
    found = Cluster(here, others, secret)
    async with AsyncExitStack() as stack:
        stack.callback(found.control.close)
        for part in others:
            await start_agent(found, part)
            stack.push_async_callback(found.end, part.node)
        yield found


async def start_agent(found: Cluster, part: Part) -> None:
    """Serve a node's agent, from now on."""

    async def serve() -> None:
        await serve_agents(
            part.agent.host, part.agent.port, part, found.published, SECRET, more=found.more.get(part.node, ())
        )

    found.serving[part.node] = asyncio.create_task(serve())
    # Its first step is to listen.
    await asyncio.sleep(0)
