"""A service over hosts whose agents Ray has started, and what Ray's deaths do to it: nothing. Run by scripts/try-ray.

Prints each check; the last line is the count of those that held. The exit status is 0 only if all did.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pdctl.launchers.environment import parse_environment
from tests.hosts.guides import Guide, verified
from tests.hosts.lab import lab
from tests.hosts.members import members
from tests.hosts.ray_service import (
    CPUS,
    GPUS,
    HEAD,
    NODES,
    RAY,
    SECRET,
    RayNode,
    Service,
    give_secret,
    one_machines_answers,
)  # fmt: skip
from tests.hosts.trial import Report
from tests.service import REPOSITORY, wait_until

_STUB = REPOSITORY / "tests" / "fakes" / "nvml_stub.c"
# Whether another job gets so many CPUs of a node.
_OTHER_JOB = """
import logging, ray, sys
ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
group = ray.util.placement_group([{"CPU": int(sys.argv[2]), f"node:{sys.argv[1]}": 0.001}])
print("got", group.wait(3))
"""
# What `pdctl up` does first, or `pdctl down` last.
_LAUNCH = """
import sys
from pathlib import Path
from pdctl import launchers
from pdctl.topology.loader import load_imagined
getattr(launchers, sys.argv[1])(load_imagined(Path(sys.argv[2])), print)
"""
# Ray's switch that makes raylets adopt daemons, and kill them.
_SUBREAPER = "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper"


# -- checks ------------------------------------------------------------------------------------------------


def refusals(service: Service) -> None:
    """What cannot work is said, and leaves nothing."""
    report, a = service.report, service.a
    wrong = service.write("another token", "wrong")
    wrong.chmod(0o600)
    done = service.up(service.write(service.text(token=wrong), "wrong.toml"))
    report.hold("a wrong token is refused", done.returncode == 1 and "Ray cannot be used" in done.stderr, done.stderr)
    done = service.up(service.write(service.text(more='device = "cuda"', replicas=5), "large.toml"))
    missing = f"no node has 1 free GPU for decode-3; free: a 0 of {GPUS}, b 0 of {GPUS}"
    report.hold("GPUs that are not there are named", missing in done.stderr, done.stderr)
    service.b.host.run(["rm", SECRET])
    done = service.up()
    told = "the agent of node b does not run" in done.stderr and SECRET in done.stderr
    report.hold("an agent that does not start is told, with its reason", told, done.stderr)
    found = service.look()
    nothing = not found["watchers"] and not found["groups"] and not any(service.agents().values())
    report.hold("a start that fails gives back what it took", nothing, (found, service.agents()))
    give_secret(service.b)
    assert a.agent() == 0, "no agent is left"


def on_gpus(service: Service) -> None:
    """Reservations of GPUs. Node b has a driver's stub with four, and a Ray that adopts daemons."""
    report, b = service.report, service.b
    stub = service.lab.folder / "stub"
    stub.mkdir()
    built = ["gcc", "-shared", "-fPIC", "-o", str(stub / "libnvidia-ml.so.1"), str(_STUB)]
    subprocess.run(built, check=True)
    b.stop()
    b.start({"LD_LIBRARY_PATH": str(stub), "PDCTL_STUB_GPUS": str(GPUS), _SUBREAPER: "1"})
    service.until(lambda found: len(found["cpus"]) == 3, "node b again")
    file = service.write(service.text(more='device = "cuda"', replicas=3), "gpus.toml")
    told = service.a.python(_LAUNCH, "start", str(file))
    free = {name: count for name, count in service.look()["gpus"].items() if name in NODES}
    report.hold("GPUs are reserved for what is to run", free == dict.fromkeys(NODES, GPUS - 3), free)
    environ = Path(f"/proc/{b.host.outer(b.agent())}/environ").read_bytes()
    seen = parse_environment(environ).get("CUDA_VISIBLE_DEVICES", "").split(",")
    report.hold("the agent sees the GPUs that are reserved, by UUID", [one[:4] for one in seen] == ["GPU-"] * 3, seen)
    report.hold("GPUs that only Ray believes in are told", "node a: 3 GPUs are reserved, but" in told, told)
    report.hold("a Ray that kills daemons is told", "node b: Ray has adopted" in told, told)
    service.a.python(_LAUNCH, "give_back", str(file))
    _nothing_left(service, "agents on GPUs")
    b.stop()
    b.start()
    service.until(lambda found: len(found["cpus"]) == 3, "node b again")


def comes_up(service: Service) -> None:
    """From nothing to a service."""
    service.expected = one_machines_answers(service)
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
    report.hold("CPUs are reserved for what runs", free == dict.fromkeys(NODES, CPUS - 3), free)
    other = service.head.python(_OTHER_JOB, service.a.host.address, str(CPUS - 2))
    report.hold("another job does not get what is reserved", "got False" in other, other)
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
    started = service.up()
    assert started.returncode == 0, started.stderr + started.stdout
    for node in (service.b, service.a, service.head):
        node.stop()
    service.start_ray()
    report.hold("agents outlive a whole Ray", all(service.agents().values()), service.agents())
    done = service.down()
    report.hold("pdctl down ends agents that Ray has forgotten", done.returncode == 0, done.stderr)
    _nothing_left(service, "pdctl down after a new head")


def _is_ours(words: str) -> bool:
    """Whether a process is one of pdctl's. Ray's own may lie in pdctl's cache."""
    return any(word.split(".")[0] == "pdctl" or word.endswith("/bin/pdctl") for word in words.split())


def _nothing_left(service: Service, what: str) -> None:
    found = service.until(lambda seen: set(seen["cpus"].values()) == {CPUS}, "Ray to have all CPUs again")
    held = {"watchers": found["watchers"], "groups": found["groups"]}
    service.report.hold(f"{what}: Ray holds nothing", not any(held.values()), held)
    left = [words for host in service.lab.hosts for pid in host.pids() if _is_ours(words := _words(pid))]
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


def guides(service: Service) -> None:
    """The guides for two servers. The second one uses the etcd of the first."""
    for node in service.nodes.values():
        node.stop()
    pages = ("two-servers.md", "two-servers-ray.md")
    made = [Guide(page, service.a.node, service.b.node, service.lab.folder) for page in pages]
    try:
        for guide in made:
            _follow(service, guide)
    finally:
        for guide in made:
            guide.close()


def _follow(service: Service, guide: Guide) -> None:
    problem = ""
    try:
        guide.follow()
    except AssertionError as failure:
        problem = str(failure)
    for node in (service.a, service.b):
        node.host.run([RAY, "stop", "--force"], node.node.env)
        node.node.cli("agent", "--stop", "-s", "llama")
    service.report.hold(f"the commands of {guide.page} can be executed ({', '.join(guide.ran)})", not problem, problem)
    problem = verified(guide.folder)
    service.report.hold(f"systemd finds nothing wrong with the units of {guide.page}", not problem, problem)


_STAGES = (refusals, on_gpus, comes_up, figures, agent_killed, deaths, given_back, guides)


def main() -> int:
    """All stages, in order, or those whose names are given: each stands on what the one before it has left."""
    report = Report()
    wanted = sys.argv[1:] or [stage.__name__ for stage in _STAGES]
    with lab(HEAD, *NODES) as hosts, members(hosts, HEAD):
        service = Service(hosts, report)
        service.start_ray()
        for stage in _STAGES:
            if stage.__name__ in wanted:
                stage(service)
    for name, values in report.figures.items():
        print(f"{name}: {', '.join(f'{value:.2f}' for value in values)}")
    for broken in report.broken:
        print(f"BROKEN: {broken}")
    print(f"{len(report.held)} of {len(report.held) + len(report.broken)} checks held")
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main())
