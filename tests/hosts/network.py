"""Trouble between hosts, under load."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.hosts.cluster import LEASE_S, TTL_S, placed
from tests.hosts.deaths import moved_back
from tests.hosts.members import CLIENT_PORT, PEER_PORT
from tests.hosts.trial import Trial
from tests.service import wait_until


@contextmanager
def cut(
    trial: Trial, name: str, other: str | None = None, oneway: bool = False, ports: tuple[int, ...] = ()
) -> Iterator[None]:
    """See Lab.cut."""
    trial.cluster.lab.cut(name, other, oneway, ports)
    try:
        yield
    finally:
        trial.cluster.lab.heal()


def pause(seconds: float) -> None:
    """Let the fault last."""
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > seconds)


def pair_cut(trial: Trial) -> None:
    """Two nodes do not hear each other; both hear etcd and everybody else."""
    cluster = trial.cluster
    with trial.streams() as streams:
        with cut(trial, "a", "b"):
            trial.go_on(streams, cluster.nodes)
            pause(LEASE_S + 1)
            trial.go_on(streams, cluster.nodes)
        trial.go_on(streams, cluster.nodes)
    trial.recovered()
    trial.judge("a and b cut", streams)


def sending_cut(trial: Trial) -> None:
    """What a sends to b is lost."""
    _one_way_cut(trial, "a", "b")


def hearing_cut(trial: Trial) -> None:
    """What b sends to a is lost."""
    _one_way_cut(trial, "b", "a")


def _one_way_cut(trial: Trial, lost: str, hearing: str) -> None:
    cluster = trial.cluster
    with trial.streams() as streams:
        with cut(trial, lost, hearing, oneway=True):
            trial.go_on(streams, cluster.nodes)
            pause(LEASE_S + 1)
            trial.go_on(streams, cluster.nodes)
        trial.go_on(streams, cluster.nodes)
    trial.recovered()
    trial.judge(f"cut from {lost} to {hearing} only", streams)


def etcd_cut(trial: Trial) -> None:
    """A node does not hear etcd, but all other nodes."""
    cluster = trial.cluster
    before = {name: entry.epoch for name, entry in cluster.entries().items()}
    with trial.streams() as streams:
        with cut(trial, "b", ports=(CLIENT_PORT, PEER_PORT)):
            wait_until(lambda: not any(name.startswith("b/") for name in cluster.entries()), 30, "the end of b's lease")
            trial.go_on(streams, cluster.nodes, answers=6)
        trial.go_on(streams, cluster.nodes)
    trial.recovered()
    now = {name: entry.epoch for name, entry in cluster.entries().items()}
    trial.report.hold("b cut from etcd: nothing was started again or moved", now == before, (before, now))
    trial.judge("b cut from etcd", streams)


def node_cut(trial: Trial) -> None:
    """A node hears nobody for a while; clients reach it."""
    cluster = trial.cluster
    with trial.streams() as streams:
        with cut(trial, "b"):
            trial.go_on(streams, cluster.nodes)
            pause(TTL_S + 1)
            trial.go_on(streams, cluster.nodes)
        trial.go_on(streams, cluster.nodes)
    trial.recovered()
    trial.judge("b cut from all", streams)


def node_cut_for_long(trial: Trial) -> None:
    """The same, until its engines are placed elsewhere: two engines of one name run at the same time."""
    cluster = trial.cluster
    cluster.apply("a", placed("a", "b", "c"))
    with trial.streams() as streams:
        with cut(trial, "b"):
            cluster.until_on("a", "c")
            cluster.until_ready(trial.engines, len(cluster.nodes) - 1)
            trial.go_on(streams, cluster.nodes)
        wait_until(lambda: "b/proxy" in cluster.entries(), 60, "b to be back")
        trial.go_on(streams, cluster.nodes)
    trial.recovered()
    trial.judge("b cut from all and lost", streams)
    moved_back(trial)


def loss(trial: Trial, percent: float = 30.0) -> None:
    """A part of what a node gets from others is lost."""
    cluster = trial.cluster
    with trial.streams() as streams:
        cluster.lab.loss("b", percent)
        trial.go_on(streams, cluster.nodes)
        pause(LEASE_S + 1)
        trial.go_on(streams, cluster.nodes)
        cluster.lab.loss("b", 0)
        trial.go_on(streams, cluster.nodes)
    trial.recovered()
    trial.judge(f"b loses {percent:g}%", streams)
