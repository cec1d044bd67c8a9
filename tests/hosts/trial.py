"""What is held to be true of a cluster under faults, and how that is found out."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime

from pdctl.errors import NotRunning
from pdctl.supervisor.cluster.entries import EngineEntry
from tests.hosts.cluster import PROXY_PORT, TTL_S, Cluster
from tests.hosts.load import Question, Streams
from tests.service import wait_until
from tests.trace_check import check

# Of a normal answer, before a fault and after it.
_ANSWERS = 24
# After a death whose agent lives, leases elsewhere are free within this, seconds: on a quiet machine, and on one so
# loaded that only the word of an agent (milliseconds) can be told from the end of a lease in etcd.
FREED_S, FREED_UNDER_LOAD_S = 0.1, 3.0


@dataclass
class Report:
    """`held` and `broken`: sentences; `figures`: measured values by name."""

    held: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)

    def hold(self, what: str, holds: object, detail: object = "") -> None:
        """Count one check."""
        (self.held if holds else self.broken).append(what)
        print(f"{'held' if holds else 'BROKEN'}: {what}{'' if holds else f': {detail}'}", flush=True)

    def figure(self, name: str, value: float) -> None:
        """One more measured value."""
        self.figures.setdefault(name, []).append(value)
        print(f"   {name}: {value:.3f}", flush=True)


@dataclass
class Trial:
    """A cluster whose engines and proxies are all ready between two faults. `expected`: one machine's answers."""

    cluster: Cluster
    expected: dict[Question, list[int]]
    report: Report
    engines: int = 4
    clients: int = 16
    turn: int = 0
    freed_s: float = FREED_S

    @contextmanager
    def streams(self, *nodes: str) -> Iterator[Streams]:
        """Clients of the proxies of these nodes, or of all; some have had answers."""
        self.turn += 1
        found = nodes or tuple(self.cluster.nodes)
        addresses = {name: (self.cluster.nodes[name].host.address, PROXY_PORT) for name in found}
        asked = list(self.expected)
        with Streams(self.cluster.lab, addresses, asked, self.expected, self.clients, self.turn) as streams:
            self.go_on(streams)
            yield streams

    def go_on(
        self, streams: Streams, nodes: Iterable[str] = (), answers: int = _ANSWERS, timeout: float = 120.0
    ) -> None:
        """Until there are so many more right answers to requests that begin now, of each of these nodes at least
        two."""
        began = time.monotonic()

        def enough() -> bool:
            found = [outcome for outcome in list(streams.outcomes) if outcome.kind == "exact" and outcome.began > began]
            by_node = all(sum(outcome.node == node for outcome in found) >= 2 for node in nodes)
            return by_node and len(found) >= answers

        wait_until(enough, timeout, f"{answers} right answers of {nodes}; before: {streams.counts()}")

    def judge(self, what: str, streams: Streams, gone: Iterable[str] = (), may_refuse: bool = False) -> None:
        """After the load has ended and all is well again: no wrong token, no failed request, nothing leaked."""
        found = streams.violations(gone, may_refuse)
        report = self.report
        wrong = [one for one in found if one.startswith("wrong")]
        counts = dict(streams.counts())
        report.hold(f"{what}: every token is right ({counts.get('exact', 0)} answers)", not wrong, wrong[:3])
        others = [one for one in found if one not in wrong]
        report.hold(f"{what}: no request fails that must not ({counts})", not others, others[:3])
        leaks = self.cluster.leaks()
        report.hold(f"{what}: nothing is leaked", not leaks, leaks[:3])
        lost = set(gone)
        if waits := [outcome.gap_s for outcome in streams.outcomes if outcome.node not in lost]:
            where = f", except on {', '.join(sorted(lost))}" if lost else ""
            report.figure(f"{what}: longest wait for a token{where}, s", max(waits))

    def recovered(self, proxies: int | None = None, timeout: float = 120.0) -> None:
        """Until all is as it was."""
        self.cluster.until_ready(self.engines, proxies, timeout)

    def is_mended(self) -> bool:
        """After a check that did not come to its end: undo its fault. Whether all is well then."""
        cluster = self.cluster
        cluster.lab.heal()
        for name, node in cluster.nodes.items():
            cluster.lab.loss(name, 0)
            if node.host.is_up:
                node.host.thaw()
        try:
            for member in cluster.etcd:
                if member.host.is_up:
                    member.be_back()
            self.recovered()
        except AssertionError:
            return False
        return True

    def check_trace(self) -> None:
        """The rules of hand-overs, over everything that all engines wrote."""
        try:
            count = check(self.cluster.trace())
        except AssertionError as failure:
            self.report.hold("the engines' events break no rule of hand-overs", False, failure)
        else:
            self.report.hold(f"the engines' events break no rule of hand-overs ({count} events)", count > 0)

    # -- deaths --------------------------------------------------------------------------------------------

    def kill_holding(self, reader: EngineEntry) -> float:
        """Kill a decode engine that holds a lease of an engine on another node. Returns when, by this machine's boot
        clock."""
        pid = self.cluster.pid(reader.node, reader.name)
        self.holding(reader)
        at = time.clock_gettime(time.CLOCK_BOOTTIME)
        os.kill(pid, signal.SIGKILL)
        return at

    @contextmanager
    def only_far(self, reader: EngineEntry) -> Iterator[None]:
        """Meanwhile the prefill engines of a decode engine's own node are drained: its KV comes from other nodes."""
        near = [e.name for e in self.cluster.engines().values() if e.role == "prefill" and e.node == reader.node]
        control = self.cluster.control(reader.node)
        for name in near:
            control.act(name, "drain")
        # Without etcd, others would not hear of it.
        wait_until(lambda: self._are_drained(near), 60, f"{near} to be drained, on every node")
        yield
        with suppress(NotRunning):  # the node may have died
            for name in near:
                control.act(name, "start")

    def _are_drained(self, names: list[str]) -> bool:
        nodes = [node for node in self.cluster.nodes.values() if node.host.is_up]
        found = [p for node in nodes for p in self.cluster.status(node.name).processes if p.name in names]
        return len(found) == len(nodes) * len(names) and all(p.state == "drained" for p in found)

    def holding(self, reader: EngineEntry) -> None:
        """Until a decode engine holds a lease of an engine on another node that it does not let go."""
        point = self.cluster.chaos / f"{reader.name}.before_read"
        found = self.cluster.engines().values()
        far = [entry for entry in found if entry.role == "prefill" and entry.node != reader.node]

        def held() -> bool:
            if point.exists():
                return False
            states = [self.cluster.state(entry) for entry in far]
            leases = [lease for state in states if state is not None for lease in state["leases"]]
            if any(lease["holder"] == reader.holder for lease in leases):
                return True
            # What was held up was read on one node, or it is too late. One at a time: proxies avoid slow engines.
            point.write_text("delay 3")
            return False

        wait_until(held, 120, f"{reader.name} to hold a lease on another node")

    def until_back(self, engine: EngineEntry) -> bool:
        """Until another start of an engine of this name is ready, as its agent says."""

        def back() -> bool:
            found = next(p for p in self.cluster.status(engine.node).processes if p.name == engine.name)
            return found.state == "ready" and found.epoch != engine.epoch

        wait_until(back, 60, f"{engine.name} to be back")
        return True

    def freed(self, what: str, figure: str, reader: EngineEntry, died_at: float, within_s: float) -> None:
        """What a decode engine held elsewhere is free soon after its death."""
        waits = self._freed_after(reader, died_at)
        for wait in waits:
            self.report.figure(figure, wait)
        if within_s < TTL_S and (seen := self._seen_after(reader, died_at)) is not None:
            self.report.figure(f"of that, until its agent saw it: {what}, s", seen)
        holds = bool(waits) and max(waits) < within_s
        self.report.hold(f"{what}: its leases on other nodes are free within {within_s:g} s", holds, waits)

    def _seen_after(self, reader: EngineEntry, died_at: float) -> float | None:
        """How long after its death its agent, which lives, wrote it into the journal, to the millisecond."""
        since_boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        for event in self.cluster.control(reader.node).events(follow=False):
            after = datetime.fromisoformat(event.at).timestamp() - since_boot - died_at
            if event.event == "exited" and event.process.endswith(reader.name) and after > -0.005:
                return after
        return None

    def _freed_after(self, reader: EngineEntry, died_at: float) -> list[float]:
        """How long after its death each lease that it held elsewhere was freed. What only stood still claims again."""
        far = {entry.epoch for entry in self.cluster.engines().values() if entry.node != reader.node}
        claimed: dict[str, float] = {}
        freed: dict[str, float] = {}
        for event in self.cluster.trace():
            if event["event"] == "claim" and event["ok"] and event["holder"] == reader.holder and event["epoch"] in far:
                claimed[event["lease"]] = event["at"]
            elif event["event"] == "ended" and event["lease"] in claimed:
                freed[event["lease"]] = event["at"]
        held = [lease for lease, at in claimed.items() if at < died_at < freed.get(lease, died_at + 1)]
        return [freed.get(lease, float("inf")) - died_at for lease in held]
