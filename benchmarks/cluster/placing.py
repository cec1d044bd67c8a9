"""What the coordinator computes: the first places, one lost node, room for lost nodes, and taking over.

python -m benchmarks.cluster.placing [--engines 64 256 1024 4096 10000]
"""

from __future__ import annotations

import argparse
import time

import msgspec

from benchmarks.cluster.fleet import EACH, node_entry, node_name, text
from pdctl.host.processor import cpu_name
from pdctl.supervisor.cluster.assignments import Assignments, Decision, orders_of
from pdctl.supervisor.cluster.coordinator import room_of_node, wanted_of
from pdctl.supervisor.cluster.entries import Order, TopologyEntry


def books(nodes: int, orders: list[Order]) -> Assignments:
    """What a new coordinator knows after it has listed nodes and orders."""
    made = Assignments(1, node_name(0), 60.0, orders, 0.0)
    for number in range(nodes):
        made.is_there(node_name(number), room_of_node(msgspec.json.encode(node_entry(number))))
    return made


def decided(made: Assignments, now: float) -> tuple[Decision, float]:
    begun = time.process_time()
    decision = made.decide(now)
    taken = time.process_time() - begun
    assert not decision.placement.problem, decision.placement.problem
    made.wrote(decision.orders)
    return decision, taken


def row(engines: int) -> list[str]:
    nodes = engines // EACH + max(2, engines // EACH // 50)
    entry = msgspec.json.encode(TopologyEntry(text(engines), "growth.toml"))
    made = books(nodes, [])
    begun = time.process_time()
    wanted = wanted_of(entry)
    read_s = time.process_time() - begun
    made.wants(wanted)
    first, first_s = decided(made, 0.0)
    values = [msgspec.json.encode(order) for order in first.orders]
    made.vanished(node_name(nodes // 2), 1.0)
    lost, lost_s = decided(made, 100.0)
    begun = time.process_time()
    again = books(nodes, orders_of(values))
    again.wants(wanted)
    assert decided(again, 0.0)[0].orders == ()
    over_s = time.process_time() - begun
    spare = books(nodes, [])
    spare.wants(wanted_of(msgspec.json.encode(TopologyEntry(text(engines, spare=1), "growth.toml"))))
    _, spare_s = decided(spare, 0.0)
    size = sum(map(len, values)), sum(len(msgspec.json.encode(node_entry(0))) for _ in range(nodes))
    figures = (1e3 * read_s, 1e3 * first_s, 1e3 * lost_s, 1e3 * over_s, 1e3 * spare_s)
    return [f"{engines}", f"{nodes}", *(f"{figure:.1f}" for figure in figures), f"{len(lost.orders)}",
            *(f"{each / 1000:.0f}" for each in size)]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=int, nargs="+", default=[64, 256, 1024, 4096, 10_000])
    print(cpu_name())
    print("| engines | nodes | read topology, ms | first places, ms | a lost node, ms | take over, ms "
          "| with spare_nodes = 1, ms | orders written | orders, kB | nodes, kB |")  # fmt: skip
    print("|" + "---|" * 10)
    for engines in parser.parse_args().engines:
        print("| " + " | ".join(row(engines)) + " |", flush=True)


if __name__ == "__main__":
    main()
