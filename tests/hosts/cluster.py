"""A service over hosts: agents, etcd members, and what a test does with them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec

from pdctl.commands.cluster.authority import Authority
from pdctl.control_api import ControlClient, MeasuredStatus
from pdctl.errors import NotAnswering, NotRunning
from pdctl.net.identity import ContextFactory, identity_in
from pdctl.supervisor.cluster.entries import READY, EngineEntry, Keys
from tests.certificates import made_ca, made_node
from tests.hosts.lab import Lab, Program, lab
from tests.hosts.members import Member, client_url, members
from tests.hosts.node import Node
from tests.service import REPOSITORY, wait_until

_INJECT = Path(__file__).parents[1] / "chaos" / "inject"
SERVICE = "t"
PROXY_PORT = 8000
SECRET = "0123456789abcdef-lab"
# Of each node, if it has certificates: their folder.
CERTIFICATES = "certificates"
# Quick, so that tests of what follows from silence are short. Seconds.
TTL_S, NODE_LOST_S = 4, 15
LEASE_S = 8


def topology(
    lab: Lab, etcd: tuple[str, ...], engines: str = "", more: str = "", certificates: bool = False
) -> str:
    """By default a prefill and a decode engine on each of two nodes, and a proxy on every node."""
    urls = ", ".join(f'"{client_url(lab[name])}"' for name in etcd)
    return f"""
[service]
name = "{SERVICE}"
model = "sample:tiny-qwen3"
served_model_name = "m"
max_model_len = 2048
[proxy]
port = {PROXY_PORT}
[cluster]
etcd = [{urls}]
interface = "eth0"
secret_file = "secret"
ttl_s = {TTL_S}
node_lost_s = {NODE_LOST_S}
{f'certificates = "{CERTIFICATES}"' if certificates else ""}
[transfer]
lease_s = {LEASE_S}
[supervisor]
grace_s = 5
stable_s = 1
{more}
{engines or placed()}
"""


def placed(first: str = "a", *second: str) -> str:
    """A prefill and a decode engine, `prefill-a-0` and `decode-a-0`, on one node, and `prefill-b-0` and `decode-b-0` on
    any of some others."""
    found = ""
    for name, nodes in (("a", (first,)), ("b", second or ("b",))):
        may = ", ".join(f'"{node}"' for node in nodes)
        for role in ("prefill", "decode"):
            found += group(f"{role}-{name}", role, nodes=may)
    return found


def group(name: str, role: str, replicas: int = 1, nodes: str = "") -> str:
    """A group of engines. All prompts go through a hand-over."""
    where = f"nodes = [{nodes}]" if nodes else ""
    return f"""
[[engines]]
name = "{name}"
role = "{role}"
replicas = {replicas}
max_num_seqs = 32
kv_cache_gb = 0.05
inline_prefill = false
{where}
"""


class Cluster:
    """The agents of a service, one on each of some hosts, and its registry.

    `chaos`: the folder in which failpoints of tests/chaos/inject are armed, in all processes.
    """

    def __init__(self, lab: Lab, etcd: list[Member], names: tuple[str, ...]) -> None:
        self.lab = lab
        self.etcd = etcd
        self.nodes = {name: Node(lab[name]) for name in names}
        self.agents: dict[str, Program] = {}
        self.keys = Keys(SERVICE)
        self.chaos = lab.folder / "chaos"
        self.chaos.mkdir()
        self.tls: ContextFactory | None = None

    # -- agents --------------------------------------------------------------------------------------------

    def configure(self, text: str) -> None:
        """Give every node its file and the secret."""
        for node in self.nodes.values():
            node.write(text)
            secret = node.write(SECRET, "secret")
            secret.chmod(0o600)

    def certify(self) -> None:
        """Give every node a certificate, and a new one if it has one. Tests call as one more node."""
        folder = self.lab.folder / "ca"
        ca = Authority.read(folder) if folder.exists() else made_ca(folder, SERVICE)
        for name, node in self.nodes.items():
            made_node(ca, node.folder / CERTIFICATES, name, node.host.address)
        self.tls = identity_in(str(made_node(ca, self.lab.folder / "observer", "observer", "127.0.0.1"))).client_context

    def start_agent(self, name: str) -> None:
        """Start a node's agent, and wait until it answers."""
        node = self.nodes[name]
        node.env |= {"PYTHONPATH": f"{REPOSITORY}:{_INJECT}", "CHAOS_DIR": str(self.chaos)}
        self.agents[name] = node.start("agent", "-f", str(node.folder / "pdctl.toml"), log="agent.log")
        wait_until(lambda: self._answers(name), timeout=60, what=f"the agent of {name}")

    def _answers(self, name: str) -> bool:
        log = self.nodes[name].folder / "agent.log"
        assert self.agents[name].is_running, log.read_text()[-3000:]
        with contextlib.suppress(NotRunning, NotAnswering):
            self.control(name).status(measurements=False)
            return True
        return False

    def control(self, name: str) -> ControlClient:
        """The control API of a node, over its unix socket."""
        return ControlClient(self.nodes[name].folder / "r" / SERVICE)

    def status(self, name: str) -> MeasuredStatus:
        """The status as a node's agent tells it."""
        return self.control(name).status()

    def apply(self, name: str, engines: str) -> None:
        """Have a topology with these engines run, by a command on this node."""
        file = self.nodes[name].write(topology(self.lab, tuple(self.nodes), engines))
        self.nodes[name].cli("apply", "-f", str(file), check=True)

    def until_ready(self, engines: int, proxies: int | None = None, timeout: float = 120.0) -> None:
        """Until so many engines, and a proxy on each node, are ready and linked, as every live proxy sees it."""
        wanted = len(self.nodes) if proxies is None else proxies

        def ready() -> bool:
            entries = [entry for entry in self.entries().values() if entry.state == READY]
            serving = [entry for entry in entries if not entry.is_engine]
            if (len(entries) - len(serving), len(serving)) != (engines, wanted):
                return False
            return all(self.healthy(entry) == engines for entry in serving)

        wait_until(ready, timeout, f"{engines} engines and {wanted} proxies to be ready")

    def until_on(self, *nodes: str, timeout: float = 60.0) -> None:
        """Until these nodes, and no others, have ready engines."""
        wait_until(
            lambda: {entry.node for entry in self.engines().values()} == set(nodes), timeout, f"engines on {nodes}"
        )

    def healthy(self, proxy: EngineEntry) -> int:
        """How many engines a proxy uses."""
        with contextlib.suppress(httpx.TransportError, ValueError):
            return sum(self.get(proxy.host, proxy.port, "/health").json()["engines"].values())
        return 0

    # -- the registry's view -------------------------------------------------------------------------------

    def entries(self) -> dict[str, EngineEntry]:
        """Engines and proxies that the registry knows, by NODE/NAME."""
        found = self.registry(self.keys.engines)
        decoded = (msgspec.json.decode(value, type=EngineEntry) for value in found.values())
        return {f"{entry.node}/{entry.name}": entry for entry in decoded}

    def registry(self, prefix: str) -> dict[str, bytes]:
        """The keys under a prefix; without a majority, as one member has them."""
        for alone in (False, True):
            for member in self.etcd:
                with contextlib.suppress(OSError):
                    return member.keys(prefix, alone)
        raise AssertionError("no etcd member answers")

    def engines(self) -> dict[str, EngineEntry]:
        """Ready engines that the registry knows, by name."""
        found = self.entries().values()
        return {entry.name: entry for entry in found if entry.is_engine and entry.state == READY}

    def coordinator(self) -> str:
        """The node that coordinates."""
        return next(iter(self.registry(self.keys.coordinator).values()), b"").decode()

    # -- processes -----------------------------------------------------------------------------------------

    def get(self, host: str, port: int, path: str, timeout: float = 5.0) -> httpx.Response:
        """What one process answers. Raises httpx.TransportError."""
        # Clients of a proxy have no certificates.
        tls = self.tls if port != PROXY_PORT else None
        return self.lab.ask(get, f"{'https' if tls else 'http'}://{host}:{port}{path}", timeout, tls)

    def state(self, entry: EngineEntry) -> dict[str, Any] | None:
        """An engine's state; None if it does not answer."""
        with contextlib.suppress(httpx.TransportError):
            return dict(self.get(entry.host, entry.port, "/pdctl/v1/state").json())
        return None

    def pool(self, node: str) -> dict[str, Any] | None:
        """How a node's proxy sees the engines; None if it does not answer."""
        with contextlib.suppress(httpx.TransportError, ValueError):
            return dict(self.get(self.nodes[node].host.address, PROXY_PORT, "/pdctl/v1/pool").json())
        return None

    def pid(self, node: str, name: str) -> int:
        """This machine's id of a node's process."""
        found = next(p for p in self.status(node).processes if p.name in (name, f"{node}/{name}"))
        assert found.pid is not None, f"{name} does not run"
        return self.nodes[node].host.outer(found.pid)

    def kill(self, node: str, name: str) -> None:
        """Kill a process of a node."""
        os.kill(self.pid(node, name), signal.SIGKILL)

    def leaks(self, timeout: float = 2 * LEASE_S) -> list[str]:
        """What engines still keep when nothing is asked of them."""
        found: list[str] = []

        def none_left() -> bool:
            found[:] = [leak for entry in self.engines().values() for leak in self._kept(entry)]
            return not found

        with contextlib.suppress(AssertionError):
            wait_until(none_left, timeout)
        return found

    def _kept(self, entry: EngineEntry) -> Iterator[str]:
        state = self.state(entry)
        if state is None:
            yield f"{entry.name} does not answer"
            return
        if state["leases"]:
            yield f"{entry.name} has leases: {state['leases']}"
        if state["blocks_free"] != state["blocks_total"]:
            counts = {key: value for key, value in state.items() if key.startswith("blocks_")}
            yield f"{entry.name} has blocks: {counts}"

    def trace(self) -> list[dict[str, Any]]:
        """What all engines did with leases, by this machine's boot clock."""
        found = []
        for node in self.nodes.values():
            for file in (node.folder / "trace").glob("*.jsonl"):
                for line in file.read_text().splitlines():
                    event = json.loads(line)
                    found.append(event | {"at": event["at"] - node.host.skew_s})
        return sorted(found, key=lambda event: float(event["at"]))


@contextmanager
def cluster(*names: str, engines: str = "", certificates: bool = False) -> Iterator[Cluster]:
    """Hosts of these names with an etcd member and an agent on each."""
    with lab(*names) as hosts, members(hosts, *names) as etcd:
        made = Cluster(hosts, etcd, names)
        made.configure(topology(hosts, names, engines, certificates=certificates))
        if certificates:
            made.certify()
        for name in names:
            made.start_agent(name)
        yield made


def get(url: str, timeout: float, tls: ContextFactory | None = None) -> httpx.Response:
    """What a process answers to whoever has the secret. Raises httpx.TransportError."""
    with httpx.Client(trust_env=False, timeout=timeout, verify=tls() if tls is not None else False) as http:
        return http.get(url, headers={"authorization": f"Bearer {SECRET}"})
