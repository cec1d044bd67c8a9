"""Every command from any node, without faults."""

from __future__ import annotations

import json

from tests.hosts.cluster import placed
from tests.hosts.trial import Trial
from tests.service import wait_until


def looking(trial: Trial) -> None:
    """Commands that change nothing say the same on every node."""
    cluster = trial.cluster
    engines = sorted(cluster.engines())
    with trial.streams() as streams:
        for name, node in cluster.nodes.items():
            status = json.loads(node.cli("status", "--json", check=True).stdout)
            known = {process["name"] for process in status["processes"]}
            proxies = {f"{other}/proxy" for other in cluster.nodes}
            trial.report.hold(f"status on {name} shows all engines and proxies", known >= {*engines, *proxies}, known)
            logs = node.cli("logs", "prefill-a-0")
            trial.report.hold(f"logs on {name} has those of an engine of a", "loading" in logs.stdout, logs)
            kv = json.loads(node.cli("kv", "--json", check=True).stdout)
            shown = sorted(engine["name"] for engine in kv["engines"])
            trial.report.hold(f"kv on {name} shows the blocks of all engines", shown == engines, kv)
            events = node.cli("events")
            trial.report.hold(f"events on {name} has those of all nodes", "decode-b-0" in events.stdout, events)
        trial.go_on(streams, cluster.nodes)
    trial.judge("commands that look", streams)


def restarting(trial: Trial) -> None:
    """`restart --drain`, of an engine of another node."""
    cluster = trial.cluster
    before = cluster.engines()["decode-b-0"]
    with trial.streams() as streams:
        done = cluster.nodes["c"].cli("restart", "decode-b-0", "--drain")
        trial.report.hold("restart --drain on c restarts an engine of b", done.returncode == 0, done)
        trial.report.hold("restart --drain: it is back when the command ends", trial.until_back(before))
        for name, node in cluster.nodes.items():
            why = node.cli("why", "decode-b-0")
            trial.report.hold(f"why on {name} tells of an engine of b", "stopped" in why.stdout, why)
        trial.go_on(streams, cluster.nodes)
    trial.recovered()
    trial.judge("restart --drain", streams)


def scaling(trial: Trial) -> None:
    """`scale` up and down, on different nodes."""
    cluster = trial.cluster
    with trial.streams() as streams:
        done = cluster.nodes["b"].cli("scale", "decode-a=2")
        trial.report.hold("scale on b adds an engine to a", done.returncode == 0, done)
        wait_until(lambda: "decode-a-1" in cluster.engines(), 60, "decode-a-1")
        cluster.until_ready(trial.engines + 1)
        trial.go_on(streams, cluster.nodes)
        done = cluster.nodes["c"].cli("scale", "decode-a=1")
        trial.report.hold("scale on c removes it", done.returncode == 0, done)
        trial.go_on(streams, cluster.nodes)
    trial.recovered()
    trial.judge("scale", streams)


def applying(trial: Trial) -> None:
    """`apply` of a file that moves two engines to another node, and back."""
    cluster = trial.cluster
    for name, wanted in (("a", "c"), ("b", "b")):
        with trial.streams() as streams:
            cluster.apply(name, placed("a", wanted))
            cluster.until_on("a", wanted)
            trial.recovered()
            trial.go_on(streams, cluster.nodes)
        trial.judge(f"apply on {name}: engines of b on {wanted}", streams)


def benching(trial: Trial) -> None:
    """`bench` from a node, against its own proxy and that of another."""
    for name, node in trial.cluster.nodes.items():
        done = node.cli("bench", "serve", "--requests", "24", "--rate", "20", "--output", "16")
        trial.report.hold(f"bench on {name} measures the service", done.returncode == 0, done)


def going_down_and_up(trial: Trial) -> None:
    """`down` on one node ends all engines; the agents stay, and `up` on another starts them again."""
    cluster = trial.cluster
    done = cluster.nodes["b"].cli("down")
    trial.report.hold("down on b ends the service", done.returncode == 0, done)
    wait_until(lambda: not cluster.entries(), 60, "all processes to be gone")
    trial.report.hold("down leaves every agent", all(agent.is_running for agent in cluster.agents.values()))
    done = cluster.nodes["c"].cli("up")
    trial.report.hold("up on c starts it again", done.returncode == 0, done)
    trial.recovered()
    with trial.streams() as streams:
        trial.go_on(streams, cluster.nodes)
    trial.judge("down and up", streams)
