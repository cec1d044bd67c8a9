"""A service over hosts: agents, etcd members, and what a test does with them."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import httpx
import msgspec

from pdctl.control_api import ControlClient, MeasuredStatus
from pdctl.supervisor.cluster.entries import EngineEntry, Keys
from tests.hosts.lab import Lab, Program
from tests.hosts.members import Member, client_url, members
from tests.hosts.node import Node
from tests.service import wait_until

SERVICE = "t"
PROXY_PORT = 8000
SECRET = "0123456789abcdef-lab"
# Quick, so that tests of what follows from silence are short. Seconds.
TTL_S, NODE_LOST_S = 2, 6
LEASE_S = 4


def topology(
    lab: Lab, etcd: tuple[str, ...], engines: str = "", transfer: str = "auto", more: str = "", lost_s: float = NODE_LOST_S
) -> str:
    """Two prefill and two decode engines, unless told otherwise, and a proxy on every node."""
    urls = ", ".join(f'"{client_url(lab[name])}"' for name in etcd)
    groups = engines or group("prefill", 2) + group("decode", 2)
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
node_lost_s = {lost_s:g}
[transfer]
backend = "{transfer}"
lease_s = {LEASE_S}
[supervisor]
grace_s = 5
stable_s = 1
{more}
{groups}
"""


def group(role: str, replicas: int, extra: str = "", name: str = "") -> str:
    """A group of engines."""
    return f"""
[[engines]]
name = "{name or role}"
role = "{role}"
replicas = {replicas}
max_num_seqs = 32
kv_cache_gb = 0.05
inline_prefill = false
{extra}
"""


class Cluster:
    """The agents of a service, one on each of some hosts, and its registry."""

    def __init__(self, lab: Lab, etcd: list[Member], names: tuple[str, ...]) -> None:
        self.lab = lab
        self.etcd = etcd
        self.nodes = {name: Node(lab[name]) for name in names}
        self.agents: dict[str, Program] = {}
        self.keys = Keys(SERVICE)

    # -- agents --------------------------------------------------------------------------------------------

    def configure(self, text: str) -> None:
        """Give every node its file and the secret."""
        for node in self.nodes.values():
            node.write(text)
            secret = node.write(SECRET, "secret")
            secret.chmod(0o600)

    def start_agent(self, name: str, *words: str, env: dict[str, str] | None = None) -> None:
        """Start a node's agent, and wait until it answers."""
        node = self.nodes[name]
        self.agents[name] = node.start("agent", "-f", str(node.folder / "pdctl.toml"), *words, log="agent.log", env=env)

        def answers() -> bool:
            log = (node.folder / "agent.log").read_text()
            assert self.agents[name].is_running, log[-3000:]
            with contextlib.suppress(Exception):
                return self.control(name).status(measurements=False) is not None
            return False

        wait_until(answers, timeout=60, what=f"the agent of {name}")

    def control(self, name: str) -> ControlClient:
        """The control API of a node, over its unix socket."""
        return ControlClient(self.nodes[name].folder / "r" / SERVICE)

    def status(self, name: str) -> MeasuredStatus:
        """The status as a node's agent tells it."""
        return self.control(name).status()

    # -- the registry's view -------------------------------------------------------------------------------

    def entries(self) -> dict[str, EngineEntry]:
        """Engines and proxies that the registry knows, by NODE/NAME."""
        for member in self.etcd:
            with contextlib.suppress(OSError):
                found = member.keys(self.keys.engines)
                break
        else:
            raise AssertionError("no etcd member answers")
        decoded = (msgspec.json.decode(value, type=EngineEntry) for value in found.values())
        return {f"{entry.node}/{entry.name}": entry for entry in decoded}

    def engines(self) -> dict[str, EngineEntry]:
        """Engines that the registry knows, by name."""
        return {entry.name: entry for entry in self.entries().values() if entry.is_engine}

    def where(self) -> dict[str, str]:
        """The node of each engine that is ready."""
        return {name: entry.node for name, entry in self.engines().items() if entry.state == "ready"}

    # -- engines and proxies, called from beside the hosts -------------------------------------------------

    def get(self, host: str, port: int, path: str, timeout: float = 5.0) -> httpx.Response:
        """What one process answers. Raises httpx.TransportError."""
        return self.lab.ask(partial(_get, f"http://{host}:{port}{path}", timeout))

    def state(self, entry: EngineEntry) -> dict[str, Any] | None:
        """An engine's state; None if it does not answer."""
        with contextlib.suppress(httpx.TransportError):
            return dict(self.get(entry.host, entry.port, "/pdctl/v1/state").json())
        return None

    def pid(self, name: str) -> int:
        """This machine's id of the process that is NODE/NAME."""
        node, _, process = name.partition("/")
        found = next(p for p in self.status(node).processes if p.name in (process, name))
        assert found.pid is not None, f"{name} does not run"
        return self.nodes[node].host.outer(found.pid)


def _get(url: str, timeout: float) -> httpx.Response:
    with httpx.Client(trust_env=False, timeout=timeout) as http:
        return http.get(url, headers={"authorization": f"Bearer {SECRET}"})
