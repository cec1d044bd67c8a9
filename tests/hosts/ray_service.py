"""A service over hosts whose agents Ray starts: Ray's processes and nodes, for scripts/try-ray."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx

from pdctl.control_api import ControlClient
from tests.hosts.lab import Host, Lab, Program
from tests.hosts.load import Question, Streams, questions
from tests.hosts.members import client_url
from tests.hosts.node import Node
from tests.hosts.trial import Report
from tests.service import wait_until

SERVICE, PORT = "t", 8000
HEAD, NODES = "head", ("a", "b")
RAY = str(Path(sys.executable).with_name("ray"))
SECRET = "/run/secret"
TOO_SLOW = "etcd does not answer"
_TRIES = 5
CPUS, GPUS = 8, 4
# A raylet that hears no head ends itself after a minute.
_HEADLESS_S = 120.0
_CLIENTS, _ANSWERS = 8, 16
# What Ray holds, as a driver on the head sees it.
_LOOK = """
import json, logging, ray
from ray._private.state import available_resources_per_node
from ray.util import list_named_actors, placement_group_table
ray.init(address="auto", namespace="pdctl", log_to_driver=False, logging_level=logging.ERROR)
standing, names = {}, [actor["name"] for actor in list_named_actors(all_namespaces=True)]
for name in names:
    try:
        asked = ray.get_actor(name, namespace="pdctl").standing.remote()
        standing[name] = json.loads(ray.get(asked, timeout=5))
    except (ray.exceptions.RayError, ValueError) as failure:
        standing[name] = {"state": type(failure).__name__, "pid": 0}
free = available_resources_per_node()
nodes = [node for node in ray.nodes() if node["Alive"]]
# Ray says something now and then as well.
print("found", json.dumps({
    "watchers": standing,
    "groups": [group["name"] for group in placement_group_table().values() if group["state"] != "REMOVED"],
    "cpus": {node["NodeManagerHostname"]: free.get(node["NodeID"], {}).get("CPU", 0) for node in nodes},
    "gpus": {node["NodeManagerHostname"]: free.get(node["NodeID"], {}).get("GPU", 0) for node in nodes},
}))
"""


class RayNode:
    """A host with Ray and the files of pdctl."""

    def __init__(self, host: Host, head: Host, token: Path) -> None:
        self.host = host
        self.node = Node(host)
        self.program: Program | None = None
        self._head = head
        self._auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        # Ray's sockets lie below a path that is the same on all nodes.
        Path("/tmp/ray").mkdir(exist_ok=True)
        done = host.run(["mount", "-t", "tmpfs", "tmpfs", "/tmp/ray"])
        assert done.returncode == 0, done.stderr

    @property
    def env(self) -> dict[str, str]:
        """Of Ray's processes, and of agents that they start."""
        return {**self.node.env, **self._auth}

    def start(self, env: Mapping[str, str] = MappingProxyType({})) -> None:
        """Start the head, or a node of it, with these variables as well."""
        place = ["--head", "--port", "6379"] if self.host is self._head else ["--address", f"{self._head.address}:6379"]
        size = ["--num-cpus", str(CPUS), "--num-gpus", str(GPUS), "--object-store-memory", "80000000"]
        quiet = ["--disable-usage-stats", "--include-log-monitor=false", "--block"]
        words = [RAY, "start", *place, "--node-ip-address", self.host.address, *size, *quiet]
        if self.host is self._head:
            words.append("--include-dashboard=false")
        self.program = self.host.start(words, self.host.folder / "ray.log", {**self.env, **env})

    def stop(self) -> None:
        """As an operator who has lost patience."""
        self.host.run([RAY, "stop", "--force"], self.env)
        self.ended()

    def kill(self, name: str) -> None:
        """SIGKILL to Ray's processes of this name."""
        found = self.named(name)
        assert found, f"{self.host.name} has no {name}"
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def named(self, name: str) -> list[int]:
        """Processes by the beginning of their title."""
        found = []
        for pid in self.host.pids():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if Path(os.fsdecode(words[0])).name.startswith(name):
                    found.append(pid)
        return found

    def ended(self) -> None:
        """Until `ray start --block` has ended."""
        assert self.program is not None
        with contextlib.suppress(ProcessLookupError):
            self.program.wait(_HEADLESS_S)

    def python(self, code: str, *words: str) -> str:
        """The output of a program."""
        done = self.host.run([sys.executable, "-c", code, *words], self.env, 300)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    def cli(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command of pdctl, by an operator whose environment knows no token. It is given again when etcd is too slow:
        on a busy machine, its one member is at times."""
        for _ in range(_TRIES):
            done = self.node.cli(*words)
            if TOO_SLOW not in done.stderr:
                break
        return done

    def agent(self) -> int:
        """The agent's pid in this host; 0 for none."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.node.folder / "r" / SERVICE / "lock").read_text())
            self.host.outer(pid)
            return pid
        return 0

    def engines(self) -> dict[str, int]:
        """The pids of this node's processes, by name."""
        status = ControlClient(self.node.folder / "r" / SERVICE).status(measurements=False)
        return {one.name: one.pid or 0 for one in status.processes if one.node == self.host.name}


class Service:
    """A head and two nodes, all with Ray, an etcd member beside the head, and a service that `pdctl up` on a starts."""

    def __init__(self, hosts: Lab, report: Report) -> None:
        self.lab = hosts
        self.report = report
        self.token = self.write("0123456789abcdef-of-ray", "token")
        self.token.chmod(0o600)
        self.nodes = {host.name: RayNode(host, hosts[HEAD], self.token) for host in hosts.hosts}
        self.head, self.a, self.b = (self.nodes[name] for name in (HEAD, *NODES))
        for node in (self.a, self.b):
            give_secret(node)
        self.file = self.write(self.text())
        self.expected: dict[Question, list[int]] = {}

    def write(self, text: str, name: str = "t.toml") -> Path:
        """A file that all hosts see."""
        path = self.lab.folder / name
        path.write_text(text)
        return path

    def text(self, token: Path | None = None, more: str = "", replicas: int = 2) -> str:
        """The topology. `more`: keys of all engines."""
        cluster = f"""
[cluster]
etcd = ["{client_url(self.lab[HEAD])}"]
interface = "eth0"
secret_file = "{SECRET}"
launcher = "ray"
ray_token_file = "{token or self.token}"
ttl_s = 5
"""
        return _topology(SERVICE, cluster, 'nodes = ["a", "b"]', f'nodes = ["a", "b"]\n{more}', replicas)

    # -- Ray -----------------------------------------------------------------------------------------------

    def start_ray(self) -> None:
        """Head and nodes, until all are there."""
        self.head.start()
        wait_until(lambda: self.head.named("gcs_server"), 60, "the head of Ray")
        for node in (self.a, self.b):
            node.start()
        self.until(lambda found: len(found["cpus"]) == 3, "three nodes of Ray")

    def look(self) -> dict[str, Any]:
        """What Ray holds."""
        said = self.head.python(_LOOK).splitlines()
        return dict(json.loads(next(line for line in said if line.startswith("found ")).removeprefix("found ")))

    def until(self, is_so: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """What Ray holds when that is so."""
        found: dict[str, Any] = {}

        def looked() -> bool:
            found.clear()
            with contextlib.suppress(AssertionError):
                found.update(self.look())
            return bool(found) and is_so(found)

        wait_until(looked, 300, what)
        return found

    def watched(self, pids: Mapping[str, int]) -> dict[str, Any]:
        """What Ray holds when both agents run and are watched."""

        def both(found: dict[str, Any]) -> bool:
            return {name: one["pid"] for name, one in found["watchers"].items()} == {
                f"{SERVICE}/{node}": pid for node, pid in pids.items()
            }

        return self.until(both, f"watchers of {pids}")

    # -- the service ---------------------------------------------------------------------------------------

    def agents(self) -> dict[str, int]:
        """The pids of the agents, by node."""
        return {node.host.name: node.agent() for node in (self.a, self.b)}

    def engines(self) -> dict[str, int]:
        """The pids of all processes, by name."""
        return self.a.engines() | self.b.engines()

    def up(self, file: Path | None = None) -> subprocess.CompletedProcess[str]:
        """`pdctl up` on node a."""
        return self.a.cli("up", "-d", "-f", str(file or self.file))

    def down(self) -> subprocess.CompletedProcess[str]:
        """`pdctl down` on node a."""
        return self.a.cli("down", "-f", str(self.file))

    @contextmanager
    def streams(self, what: str) -> Iterator[Streams]:
        """Clients of both proxies. None of them may see that something happens."""
        addresses = {node.host.name: (node.host.address, PORT) for node in (self.a, self.b)}
        with Streams(self.lab, addresses, list(self.expected), self.expected, _CLIENTS) as streams:
            self.go_on(streams)
            yield streams
            self.go_on(streams)
        found = streams.violations()
        counts = dict(streams.counts())
        self.report.hold(f"{what}: no stream fails, each token is right ({counts})", not found, found[:3])

    def go_on(self, streams: Streams) -> None:
        """Until there are some more right answers to requests that begin now."""
        began = time.monotonic()

        def enough() -> bool:
            found = [one for one in list(streams.outcomes) if one.kind == "exact"]
            return sum(one.began > began for one in found) >= _ANSWERS

        wait_until(enough, 240, f"answers; before: {streams.counts()}")


def _topology(service: str, cluster: str, proxy: str, engines: str, replicas: int = 2) -> str:
    groups = "".join(
        f"""
[[engines]]
name = "{role}"
role = "{role}"
replicas = {replicas}
max_num_seqs = 16
kv_cache_gb = 0.05
{engines}
"""
        for role in ("prefill", "decode")
    )
    return f"""
[service]
name = "{service}"
model = "sample:tiny-qwen3"
served_model_name = "m"
max_model_len = 2048
[proxy]
port = {PORT}
{proxy}
[supervisor]
stable_s = 1
{cluster}
{groups}
"""


def give_secret(node: RayNode) -> None:
    """In a folder that each host has for itself."""
    done = node.host.run(["sh", "-c", f"umask 077; echo 0123456789abcdef-lab >{SECRET}"])
    assert done.returncode == 0, done.stderr


def one_machines_answers(service: Service) -> dict[Question, list[int]]:
    """Answers of a service on one machine, without cluster."""
    node, address = service.head.node, service.head.host.address
    file = node.write(_topology("alone", "", f'host = "{address}"', ""), "alone.toml")
    node.cli("up", "-d", "-f", str(file), check=True)

    def ask(question: Question) -> list[int]:
        body = question.body() | {"stream": False}
        with httpx.Client(trust_env=False, timeout=60) as http:
            answer = http.post(f"http://{address}:{PORT}/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            return list(answer.json()["choices"][0]["token_ids"])

    try:
        return {question: service.lab.ask(ask, question) for question in questions(1, 16)}
    finally:
        node.cli("down", "-f", str(file), check=True)
