"""Three hosts, three etcd members, an agent on each: commands from every node, and faults under 16 streams.

    scripts/try-hosts [--only NAME[,NAME...]] [--times N] [--list]

Every answer is compared with that of one engine on one machine. The last line is the count of checks that held; the
exit status is 0 only if all did.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from pdctl.engine.samples.prepare import prepare
from pdctl.host.models import locate_model
from pdctl.host.users import cache_root
from tests.hosts import deaths, network, registry, verbs
from tests.hosts.cluster import Cluster, cluster
from tests.hosts.engine import start
from tests.hosts.lab import reason_to_skip
from tests.hosts.load import Question, questions
from tests.hosts.trial import FREED_S, Report, Trial
from tests.registry import etcd

NAMES = ("a", "b", "c")
# In this order. Those that end with a node without engines of its own come last.
CHECKS: dict[str, Callable[[Trial], None]] = {
    "look": verbs.looking,
    "bench": verbs.benching,
    "restart": verbs.restarting,
    "scale": verbs.scaling,
    "apply": verbs.applying,
    "down": verbs.going_down_and_up,
    "writes": registry.writes_per_request,
    "engine": deaths.engine_killed,
    "prefill": deaths.prefill_killed,
    "core": deaths.core_killed,
    "proxy": deaths.proxy_killed,
    "agent": deaths.agent_killed,
    "coordinator": deaths.coordinator_frozen,
    "freeze": deaths.host_frozen,
    "etcd-kill": registry.leader_killed,
    "etcd-freeze": registry.leader_frozen,
    "quorum": registry.quorum_lost,
    "expiry": registry.mass_expiry,
    "cut": network.pair_cut,
    "cut-etcd": network.etcd_cut,
    "cut-all": network.node_cut,
    "cut-sending": network.sending_cut,
    "cut-hearing": network.hearing_cut,
    "loss": network.loss,
    "power": deaths.node_lost,
    "cut-long": network.node_cut_for_long,
}
# Faults are tried so many times by default; commands once.
_ONCE = ("look", "bench", "restart", "scale", "apply", "down", "writes")


def model() -> Path:
    """The tiny sample, made if it is missing."""
    located = locate_model("sample:tiny-qwen3", cache_root())
    return Path(prepare(located.spec, located.path, lambda what, fraction: None))


def answers_of_one_machine(cluster: Cluster, path: Path, asked: list[Question]) -> dict[Question, list[int]]:
    """What one engine, alone, answers."""
    alone = start(cluster.lab, NAMES[0], "alone", path, "--max-num-seqs", "1")
    try:
        alone.until_ready()
        return {question: alone.tokens(question.body()) for question in asked}
    finally:
        alone.program.kill()


@contextmanager
def trial(
    report: Report, clients: int = 16, certificates: bool = False, freed_s: float = FREED_S
) -> Iterator[Trial]:
    """A service on three hosts."""
    path = model()
    with cluster(*NAMES, certificates=certificates) as made:
        expected = answers_of_one_machine(made, path, questions(5))
        began = time.monotonic()
        done = made.nodes["b"].cli("up")
        report.hold("up on b starts the service on a and b, and a proxy on each node", done.returncode == 0, done)
        report.figure("up, s", time.monotonic() - began)
        found = Trial(made, expected, report, clients=clients, freed_s=freed_s)
        try:
            found.recovered()
            yield found
        except AssertionError:
            tell_logs(made)
            raise


def main(argv: list[str]) -> int:
    """Run the checks; 0 if all held."""
    parser = argparse.ArgumentParser(prog="scripts/try-hosts", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="names of checks, comma-separated")
    parser.add_argument("--times", type=int, default=3, help="how often each fault is tried")
    parser.add_argument("--list", action="store_true", help="list the checks")
    options = parser.parse_args(argv)
    if options.list:
        print("\n".join(CHECKS))
        return 0
    names = options.only.split(",") if options.only else list(CHECKS)
    if unknown := [name for name in names if name not in CHECKS]:
        parser.error(f"no check is called {', '.join(unknown)}; there are: {', '.join(CHECKS)}")
    if reason := reason_to_skip() or ("" if etcd.BINARY else "NOT TESTED: etcd is not installed"):
        print(reason, file=sys.stderr)
        return 2
    report = Report()
    with trial(report) as found:
        turns = [name for name in names for _ in range(1 if name in _ONCE else options.times)]
        for name in turns:
            print(f"-- {name}", flush=True)
            if not ended(found, name):
                break
        else:
            costs(found)
        found.check_trace()
    tell(report)
    total = len(report.held) + len(report.broken)
    print(f"{len(report.held)} of {total} checks held")
    return 0 if not report.broken else 1


def ended(trial: Trial, name: str) -> bool:
    """Whether the next check finds all as it was."""
    try:
        CHECKS[name](trial)
    except AssertionError as failure:
        traceback.print_exc()
        trial.report.hold(f"{name} ends", False, failure)
        tell_logs(trial.cluster)
        return trial.is_mended()
    return True


def costs(trial: Trial) -> None:
    """What an agent costs while nothing happens: CPU over some seconds, and memory."""
    agents = {name: psutil.Process(program.pid) for name, program in trial.cluster.agents.items()}
    before = {name: sum(process.cpu_times()[:2]) for name, process in agents.items()}
    began = time.monotonic()
    time.sleep(10)
    lasted = time.monotonic() - began
    for name, process in agents.items():
        used = sum(process.cpu_times()[:2]) - before[name]
        trial.report.figure("CPU of an agent, percent of a core", 100 * used / lasted)
        trial.report.figure("memory of an agent (PSS), MB", process.memory_full_info().pss / 1e6)


def tell(report: Report) -> None:
    """Figures, and what did not hold."""
    for name, values in report.figures.items():
        ordered = sorted(values)
        worst = ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)]
        print(f"{name}: median {statistics.median(ordered):.3f}, p99 {worst:.3f}, of {len(ordered)}")
    for sentence in report.broken:
        print(f"BROKEN: {sentence}")


def tell_logs(cluster: Cluster) -> None:
    """The ends of the agents' logs, and what they say now, on stderr."""
    for name, node in cluster.nodes.items():
        lines = (node.folder / "agent.log").read_text().splitlines()[-60:]
        print(f"--- agent of {name}", *lines, sep="\n", file=sys.stderr)
    for name in [name for name, node in cluster.nodes.items() if node.host.is_up and cluster.agents[name].is_running]:
        print(cluster.nodes[name].cli("status").stdout, file=sys.stderr)
    for entry in cluster.engines().values():
        print(entry.name, cluster.state(entry), file=sys.stderr)
    for name in cluster.nodes:
        print(f"the proxy of {name}", cluster.pool(name), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
