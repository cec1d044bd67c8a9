"""A service over hosts whose agents Ray has started, and what Ray's deaths do to it: nothing. Run by scripts/try-ray.

Prints each check; the last line is the count of those that held. The exit status is 0 only if all did.
"""

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
from typing import Any

import httpx

from pdctl.control_api import ControlClient
from pdctl.launchers.environment import parse_environment
from tests.hosts.lab import Host, Lab, Program, lab
from tests.hosts.load import Question, Streams, questions
from tests.hosts.members import client_url, members
from tests.hosts.node import Node
from tests.hosts.trial import Report
from tests.service import wait_until

SERVICE, PORT = "t", 8000
HEAD, NODES = "head", ("a", "b")
_RAY = str(Path(sys.executable).with_name("ray"))
_SECRET = "/run/secret"
_CPUS, _GPUS = 8, 4
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
print(json.dumps({
    "watchers": standing,
    "groups": [group["name"] for group in placement_group_table().values() if group["state"] != "REMOVED"],
    "cpus": {node["NodeManagerHostname"]: free.get(node["NodeID"], {}).get("CPU", 0) for node in nodes},
    "gpus": {node["NodeManagerHostname"]: free.get(node["NodeID"], {}).get("GPU", 0) for node in nodes},
}))
"""
# Whether another job gets so many CPUs of a node.
_OTHER_JOB = """
import logging, ray, sys
ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
group = ray.util.placement_group([{"CPU": int(sys.argv[2]), f"node:{sys.argv[1]}": 0.001}])
print(group.wait(3))
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

    def start(self) -> None:
        """Start the head, or a node of it."""
        place = ["--head", "--port", "6379"] if self.host is self._head else ["--address", f"{self._head.address}:6379"]
        size = ["--num-cpus", str(_CPUS), "--num-gpus", str(_GPUS), "--object-store-memory", "80000000"]
        quiet = ["--disable-usage-stats", "--include-log-monitor=false", "--block"]
        words = [_RAY, "start", *place, "--node-ip-address", self.host.address, *size, *quiet]
        if self.host is self._head:
            words.append("--include-dashboard=false")
        self.program = self.host.start(words, self.host.folder / "ray.log", self.env)

    def stop(self) -> None:
        """As an operator who has lost patience."""
        self.host.run([_RAY, "stop", "--force"], self.env)
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
        done = self.host.run([sys.executable, "-c", code, *words], self.env, 60)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    def cli(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command of pdctl, by an operator whose environment knows no token."""
        return self.node.cli(*words)

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
secret_file = "{_SECRET}"
launcher = "ray"
ray_token_file = "{token or self.token}"
ttl_s = 2
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
        return dict(json.loads(self.head.python(_LOOK).splitlines()[0]))

    def until(self, is_so: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """What Ray holds when that is so."""
        found: dict[str, Any] = {}

        def looked() -> bool:
            found.clear()
            with contextlib.suppress(AssertionError):
                found.update(self.look())
            return bool(found) and is_so(found)

        wait_until(looked, 90, what)
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
        """Until there are some more answers to requests that begin now."""
        began = time.monotonic()

        def enough() -> bool:
            return sum(one.began > began for one in list(streams.outcomes)) >= _ANSWERS

        wait_until(enough, 120, f"answers; before: {streams.counts()}")


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
    done = node.host.run(["sh", "-c", f"umask 077; echo 0123456789abcdef-lab >{_SECRET}"])
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


# -- checks ------------------------------------------------------------------------------------------------


def refusals(service: Service) -> None:
    """What cannot work is said, and leaves nothing."""
    report, a = service.report, service.a
    wrong = service.write("another token", "wrong")
    wrong.chmod(0o600)
    done = service.up(service.write(service.text(token=wrong), "wrong.toml"))
    report.hold("a wrong token is refused", done.returncode == 1 and "Ray cannot be used" in done.stderr, done.stderr)
    done = service.up(service.write(service.text(more='device = "cuda"', replicas=5), "large.toml"))
    missing = f"no node has 1 free GPU for decode-3; free: a 0 of {_GPUS}, b 0 of {_GPUS}"
    report.hold("GPUs that are not there are named", missing in done.stderr, done.stderr)
    service.b.host.run(["rm", _SECRET])
    done = service.up()
    told = "the agent of node b does not run" in done.stderr and _SECRET in done.stderr
    report.hold("an agent that does not start is told, with its reason", told, done.stderr)
    found = service.look()
    nothing = not found["watchers"] and not found["groups"] and not any(service.agents().values())
    report.hold("a start that fails gives back what it took", nothing, (found, service.agents()))
    give_secret(service.b)
    assert a.agent() == 0, "no agent is left"


def comes_up(service: Service) -> None:
    """From nothing to a service."""
    report, began = service.report, time.monotonic()
    done = service.up()
    report.figure("pdctl up, s", time.monotonic() - began)
    report.hold("pdctl up brings agents onto the nodes, and the service up", done.returncode == 0, done.stderr)
    with service.streams("answers are those of one machine"):
        pass
    for node in (service.a, service.b):
        held = _belongs_to_nobody(node)
        report.hold(f"the agent on {node.host.name} has nothing of Ray", not held, held)
    found = service.look()
    free = {name: count for name, count in found["cpus"].items() if name in NODES}
    # A CPU for each engine, and one for the agent.
    report.hold("CPUs are reserved for what runs", free == dict.fromkeys(NODES, _CPUS - 3), free)
    other = service.head.python(_OTHER_JOB, service.a.host.address, str(_CPUS - 2)).strip()
    report.hold("another job does not get what is reserved", other == "False", other)
    before, began = service.agents(), time.monotonic()
    done = service.up()
    same = service.agents() == before and done.returncode == 0
    report.hold("pdctl up again changes nothing", same, (before, service.agents(), done.stderr))


def _belongs_to_nobody(node: RayNode) -> str:
    """What of Ray is left in an agent; "" for nothing."""
    place = Path("/proc", str(node.host.outer(node.agent())))
    status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines() if ":" in line)
    variables = parse_environment((place / "environ").read_bytes())
    found = {
        "parent": int(status["NSpid"].split()[-1] == "1" or status["PPid"].strip() in map(str, node.named("raylet"))),
        "blocked signals": int(status["SigBlk"], 16),
        "oom_score_adj": int((place / "oom_score_adj").read_text()),
        "variables": [name for name in variables if name.startswith(("RAY_", "LD_PRELOAD", "OMP_", "SPT_"))],
    }
    return ", ".join(f"{name}: {value}" for name, value in found.items() if value)


def deaths(service: Service) -> None:
    """Ray's processes die under load, from the smallest to all of them."""
    before, running = service.agents(), service.engines()

    def unchanged(what: str) -> None:
        found = service.watched(before)
        service.report.hold(f"{what}: the agents live, and are watched", service.agents() == before, found)
        service.report.hold(f"{what}: no process has been started again", service.engines() == running, running)

    with service.streams("watcher killed"):
        service.b.kill("ray::Watcher")
        unchanged("watcher killed")
    with service.streams("raylet killed"):
        service.b.kill("raylet")
        service.b.ended()
        service.b.start()
        unchanged("raylet killed and started")
    with service.streams("ray stop --force"):
        service.b.stop()
        service.b.start()
        unchanged("ray stop --force, and start")
    with service.streams("head killed"):
        service.head.kill("gcs_server")
        for node in (service.head, service.a, service.b):
            node.ended()
            node.stop()
        service.report.hold("no head, no raylet: the agents live", service.agents() == before, service.agents())
        service.start_ray()
        began = time.monotonic()
        done = service.up()
        service.report.figure("pdctl up that adopts, s", time.monotonic() - began)
        adopted = all(f"the agent of node {node} was running (pid {before[node]})" in done.stderr for node in NODES)
        service.report.hold("after a new head, pdctl up adopts the agents", adopted, done.stderr)
        unchanged("head killed and started")


def agent_killed(service: Service) -> None:
    """The watcher starts another, which adopts the engines."""
    before, running = service.agents(), service.engines()
    with service.streams("agent killed"):
        os.kill(service.b.host.outer(before["b"]), signal.SIGKILL)
        began = time.monotonic()
        wait_until(lambda: service.b.agent() not in (0, before["b"]), 60, "another agent on b")
        service.report.figure("agent killed, another runs, s", time.monotonic() - began)
        found = service.watched(service.agents())
        service.report.hold("agent killed: its watcher starts another", service.agents() != before, found)
        wait_until(lambda: len(service.engines()) == len(running), 60, "all processes to be known again")
        service.report.hold("agent killed: the next one adopts the engines", service.engines() == running, running)


def given_back(service: Service) -> None:
    """Nothing is left, whether or not Ray remembers."""
    report = service.report
    began = time.monotonic()
    done = service.down()
    report.figure("pdctl down, s", time.monotonic() - began)
    report.hold("pdctl down succeeds", done.returncode == 0, done.stderr)
    _nothing_left(service, "pdctl down")
    # An agent that Ray has forgotten.
    assert service.up().returncode == 0
    for node in (service.b, service.a, service.head):
        node.stop()
    service.start_ray()
    report.hold("agents outlive a whole Ray", all(service.agents().values()), service.agents())
    done = service.down()
    report.hold("pdctl down ends agents that Ray has forgotten", done.returncode == 0, done.stderr)
    _nothing_left(service, "pdctl down after a new head")


def _nothing_left(service: Service, what: str) -> None:
    found = service.until(lambda seen: set(seen["cpus"].values()) == {_CPUS}, "Ray to have all CPUs again")
    held = {"watchers": found["watchers"], "groups": found["groups"]}
    service.report.hold(f"{what}: Ray holds nothing", not any(held.values()), held)
    left = [words for host in service.lab.hosts for pid in host.pids() if "pdctl" in (words := _words(pid))]
    service.report.hold(f"{what}: no process is left", not left, left)
    files = [str(path) for node in (service.a, service.b) for path in (node.node.folder / "r").glob("*")]
    service.report.hold(f"{what}: no run directory is left", not files, files)


def _words(pid: int) -> str:
    """A process's command line; "" if it has ended meanwhile."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


def figures(service: Service) -> None:
    """Memory of what Ray and pdctl have on a node that runs engines."""
    of_ray = ("raylet", "ray::Dash", "ray::Runtime")
    for what, names in (("raylet and its helpers", of_ray), ("watcher", ("ray::Watch",))):
        pids = [pid for name in names for pid in service.b.named(name)]
        service.report.figure(f"PSS of {what} on a node, MB", sum(map(_pss, pids)) / 2**20)
    service.report.figure("PSS of an agent, MB", _pss(service.b.host.outer(service.b.agent())) / 2**20)


def _pss(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith("Pss:")))


def main() -> int:
    """All checks, in order: each stands on what the one before it has left."""
    report = Report()
    with lab(HEAD, *NODES) as hosts, members(hosts, HEAD):
        service = Service(hosts, report)
        service.start_ray()
        refusals(service)
        service.expected = one_machines_answers(service)
        comes_up(service)
        figures(service)
        agent_killed(service)
        deaths(service)
        given_back(service)
    for name, values in report.figures.items():
        print(f"{name}: {', '.join(f'{value:.2f}' for value in values)}")
    for broken in report.broken:
        print(f"BROKEN: {broken}")
    print(f"{len(report.held)} of {len(report.held) + len(report.broken)} checks held")
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main())
