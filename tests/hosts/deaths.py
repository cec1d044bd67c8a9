"""Deaths of processes and of nodes, under load."""

from __future__ import annotations

import os
import signal
import time

from pdctl.supervisor.cluster.entries import EngineEntry
from tests.hosts.cluster import LEASE_S, TTL_S, Cluster, placed
from tests.hosts.trial import Trial
from tests.service import wait_until


def engine_killed(trial: Trial) -> None:
    """SIGKILL of a decode engine that holds leases of an engine on another node."""
    cluster = trial.cluster
    reader = cluster.engines()["decode-b-0"]
    with trial.streams() as streams:
        with trial.only_far(reader):
            died_at = trial.kill_holding(reader)
        trial.go_on(streams, cluster.nodes)
    trial.recovered()
    trial.freed("engine killed", "far exit to freed KV, s", reader, died_at, trial.freed_s)
    trial.judge("engine killed", streams)


def prefill_killed(trial: Trial) -> None:
    """SIGKILL of a prefill engine."""
    with trial.streams() as streams:
        server = trial.cluster.engines()["prefill-a-0"]
        trial.cluster.kill(server.node, server.name)
        trial.go_on(streams, trial.cluster.nodes)
    trial.recovered()
    trial.judge("prefill engine killed", streams)


def proxy_killed(trial: Trial) -> None:
    """SIGKILL of one node's proxy: what it carried breaks, nothing else."""
    with trial.streams() as streams:
        trial.cluster.kill("c", "proxy")
        trial.go_on(streams, ("a", "b"))
    trial.recovered()
    trial.judge("proxy killed", streams, gone=("c",))


def agent_killed(trial: Trial) -> None:
    """SIGKILL of an agent; the next one adopts what runs."""
    cluster = trial.cluster
    before = {name: entry.epoch for name, entry in cluster.entries().items()}
    with trial.streams() as streams:
        cluster.agents["b"].kill()
        # The registry forgets the node meanwhile: nobody must mind.
        wait_until(lambda: not any(name.startswith("b/") for name in cluster.entries()), 30, "the end of b's lease")
        trial.go_on(streams, cluster.nodes, answers=6)
        cluster.start_agent("b")
        trial.recovered()
        trial.go_on(streams, cluster.nodes)
    after = {name: entry.epoch for name, entry in cluster.entries().items()}
    trial.report.hold("agent killed: the next one adopts every process", before == after, (before, after))
    trial.judge("agent killed", streams)


def ready_elsewhere(cluster: Cluster, node: str) -> list[EngineEntry]:
    """Ready engines on all nodes but one."""
    return [entry for entry in cluster.engines().values() if entry.node != node]


def node_lost(trial: Trial) -> None:
    """Power off, its engines placed elsewhere, power on again."""
    cluster, lost = trial.cluster, "b"
    reader = cluster.engines()["decode-b-0"]
    assert reader.node == lost, "it runs on b"
    cluster.apply("c", placed("a", "b", "c"))
    moved = {entry.name for entry in cluster.engines().values() if entry.node == lost}
    with trial.streams() as streams:
        with trial.only_far(reader):
            trial.holding(reader)
            died_at = time.clock_gettime(time.CLOCK_BOOTTIME)
            cluster.nodes[lost].host.kill()
        trial.go_on(streams, ("a", "c"))
        wait_until(lambda: {entry.name for entry in ready_elsewhere(cluster, lost)} >= moved, 60, "a new place")
        placed_s = time.clock_gettime(time.CLOCK_BOOTTIME) - died_at
        cluster.until_ready(trial.engines, len(cluster.nodes) - 1)
        trial.go_on(streams, ("a", "c"))
    trial.report.figure("node lost to its engines ready elsewhere, s", placed_s)
    trial.freed("node lost", "lost node to freed KV, s", reader, died_at, TTL_S + 1)
    cluster.nodes[lost].host.boot()
    member = next(member for member in cluster.etcd if member.host.name == lost)
    member.start()
    member.until_ready()
    cluster.start_agent(lost)
    trial.recovered()
    trial.judge("node lost", streams, gone=(lost,))
    moved_back(trial)


def moved_back(trial: Trial) -> None:
    """A topology that places engines elsewhere is applied: streams move along."""
    cluster = trial.cluster
    with trial.streams() as streams:
        cluster.apply("a", placed())
        cluster.until_on("a", "b")
        trial.recovered()
        trial.go_on(streams, cluster.nodes)
    trial.judge("engines moved to another node", streams)


def coordinator_frozen(trial: Trial) -> None:
    """SIGSTOP of the agent that coordinates, for longer than its key lives."""
    cluster = trial.cluster
    frozen = cluster.coordinator()
    with trial.streams() as streams:
        cluster.agents[frozen].signal(signal.SIGSTOP)
        wait_until(lambda: cluster.coordinator() not in ("", frozen), 30, "another agent to coordinate")
        trial.go_on(streams, cluster.nodes)
        cluster.agents[frozen].signal(signal.SIGCONT)
        trial.go_on(streams, cluster.nodes)
    trial.recovered()
    trial.report.hold("coordinator frozen: another one has taken over, and stays", cluster.coordinator() != frozen)
    trial.judge("coordinator frozen", streams)


def host_frozen(trial: Trial) -> None:
    """A whole machine stops for longer than leases live, and goes on. Nothing says that it has stopped."""
    cluster, frozen = trial.cluster, "b"
    reader = cluster.engines()["decode-b-0"]
    assert reader.node == frozen, "it runs on b"
    with trial.streams() as streams:
        with trial.only_far(reader):
            trial.holding(reader)
            died_at = time.clock_gettime(time.CLOCK_BOOTTIME)
            cluster.nodes[frozen].host.freeze()
            began = time.monotonic()
            # Not many: each client goes to that machine sooner or later, and waits there.
            trial.go_on(streams, ("a", "c"), answers=6)
            wait_until(lambda: time.monotonic() - began > LEASE_S + 1)
            cluster.nodes[frozen].host.thaw()
            trial.report.figure("host frozen for, s", time.monotonic() - began)
        trial.go_on(streams, cluster.nodes)
        trial.report.figure("host frozen to answers there again, s", time.monotonic() - began)
    trial.recovered()
    trial.freed("host frozen", "silent node to freed KV, s", reader, died_at, TTL_S + 1)
    # What that machine's proxy carried came late, but was right.
    trial.judge("host frozen", streams, gone=(frozen,))


def core_killed(trial: Trial) -> None:
    """SIGKILL of the part of an engine that computes; its front follows it."""
    cluster = trial.cluster
    with trial.streams() as streams:
        front = cluster.pid("a", "decode-a-0")
        with open(f"/proc/{front}/task/{front}/children") as children:  # noqa: PTH123
            core = int(children.read().split()[0])
        os.kill(core, signal.SIGKILL)
        trial.go_on(streams, cluster.nodes)
    trial.recovered()
    trial.judge("core killed", streams)
