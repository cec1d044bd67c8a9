"""Trouble with etcd, under load: nothing of the service depends on it."""

from __future__ import annotations

import time

from tests.hosts.cluster import TTL_S, Cluster
from tests.hosts.members import Member, leader
from tests.hosts.trial import Trial
from tests.service import wait_until


def epochs(cluster: Cluster) -> dict[str, str]:
    """Which start of each engine and proxy runs where."""
    return {name: entry.epoch for name, entry in cluster.entries().items()}


def silence_is_told(trial: Trial) -> None:
    """`pdctl status` says that the registry is not heard."""
    cluster = trial.cluster

    def told() -> bool:
        return "etcd" in cluster.nodes["a"].cli("status").stdout

    wait_until(told, 30, "status to say that etcd is not heard")
    trial.report.hold("etcd not heard: status says so", True)


def unchanged(trial: Trial, what: str, before: dict[str, str]) -> None:
    """The registry knows the same starts of everything again."""
    wait_until(lambda: epochs(trial.cluster).keys() >= before.keys(), 60, "everything to be registered again")
    now = epochs(trial.cluster)
    trial.report.hold(f"{what}: nothing was started again or moved", now == before, (before, now))


def leader_killed(trial: Trial) -> None:
    """SIGKILL of the member that leads."""
    cluster = trial.cluster
    before = epochs(cluster)
    with trial.streams() as streams:
        lost = leader(cluster.etcd)
        lost.kill()
        trial.go_on(streams, cluster.nodes)
        wait_until(lambda: any(member.leads() for member in cluster.etcd if member is not lost), 30, "another leader")
        trial.go_on(streams, cluster.nodes)
        lost.start()
        lost.until_ready()
    unchanged(trial, "etcd leader killed", before)
    trial.recovered()
    trial.judge("etcd leader killed", streams)


def leader_frozen(trial: Trial) -> None:
    """SIGSTOP of the member that leads, for longer than leases live."""
    cluster = trial.cluster
    before = epochs(cluster)
    with trial.streams() as streams:
        frozen = leader(cluster.etcd)
        frozen.freeze()
        began = time.monotonic()
        trial.go_on(streams, cluster.nodes)
        wait_until(lambda: time.monotonic() - began > 3 * TTL_S)
        frozen.thaw()
        trial.go_on(streams, cluster.nodes)
    unchanged(trial, "etcd leader frozen", before)
    trial.recovered()
    trial.judge("etcd leader frozen", streams)


def quorum_lost(trial: Trial) -> None:
    """Two of three members die, and then an engine that holds leases on another node."""
    cluster = trial.cluster
    reader = cluster.engines()["decode-b-0"]
    lost: list[Member] = cluster.etcd[1:]
    with trial.streams() as streams:
        with trial.only_far(reader):
            for member in lost:
                member.kill()
            silence_is_told(trial)
            trial.go_on(streams, cluster.nodes)
            died_at = trial.kill_holding(reader)
        trial.go_on(streams, cluster.nodes)
        back = trial.until_back(reader)
        trial.go_on(streams, cluster.nodes)
        for member in lost:
            member.start()
        for member in lost:
            member.until_ready()
    trial.recovered()
    trial.report.hold("quorum lost: an engine that dies is started again", back)
    trial.freed("quorum lost", "far exit to freed KV without etcd, s", reader, died_at, trial.freed_s)
    trial.judge("quorum lost", streams)


def mass_expiry(trial: Trial) -> None:
    """All members stop for so long that every lease has ended when they go on."""
    cluster = trial.cluster
    before = epochs(cluster)
    with trial.streams() as streams:
        for member in cluster.etcd:
            member.freeze()
        began = time.monotonic()
        trial.go_on(streams, cluster.nodes)
        wait_until(lambda: time.monotonic() - began > 4 * TTL_S)
        for member in cluster.etcd:
            member.thaw()
        trial.go_on(streams, cluster.nodes)
        unchanged(trial, "mass expiry", before)
        trial.go_on(streams, cluster.nodes)
    trial.recovered()
    trial.judge("mass expiry", streams)


def writes_per_request(trial: Trial) -> None:
    """Requests write nothing into etcd."""
    cluster = trial.cluster
    with trial.streams() as streams:
        before, count = cluster.etcd[0].revision(), len(streams.outcomes)
        trial.go_on(streams, answers=200, timeout=120)
        writes, answers = cluster.etcd[0].revision() - before, len(streams.outcomes) - count
    trial.report.figure("etcd writes per request", writes / answers)
    trial.report.hold(f"requests write nothing into etcd ({answers} of them)", writes == 0, f"{writes} writes")
    trial.judge("no fault", streams)
