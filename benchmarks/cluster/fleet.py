"""A cluster that exists only as what its nodes tell: 8 engines a node, half of them prefill."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from statistics import median

import msgspec

from pdctl.host import Gpu, Host
from pdctl.host.facts import encode_facts
from pdctl.supervisor.cluster.entries import EngineEntry, Keys, NodeEntry
from pdctl.supervisor.service.others import Others
from pdctl.topology.loader import parse_text
from pdctl.topology.spec import Topology
from tests.topology.test_loader import host

EACH = 8
KEYS = Keys("growth")
TOPOLOGY = """
[service]
name = "growth"
model = "sample:tiny-qwen3"
[cluster]
etcd = ["http://127.0.0.1:2379"]
interface = "eth0"
secret_file = "secret"
spare_nodes = {spare}
[[engines]]
name = "prefill"
role = "prefill"
device = "cuda"
replicas = {each}
[[engines]]
name = "decode"
role = "decode"
device = "cuda"
replicas = {each}
"""


def node_name(number: int) -> str:
    return f"node-{number:04}"


def engines_of(number: int) -> list[EngineEntry]:
    """What one node tells of its engines."""
    address = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
    return [
        EngineEntry(
            node_name(number), f"{role}-{number * EACH // 2 + n // 2}", "builtin", role, address, 18100 + n,
            f"{number:08x}-{n:012x}", inline=role == "decode",
        )
        for n in range(EACH) for role in (("prefill", "decode")[n % 2],)
    ]  # fmt: skip


def fleet(engines: int) -> list[EngineEntry]:
    return [entry for number in range(engines // EACH) for entry in engines_of(number)]


def facts() -> bytes:
    """What a node of eight GPUs tells of itself."""
    return encode_facts(node_host())


def node_host() -> Host:
    return host(tuple(Gpu(n, f"GPU-0123456789abcdef-{n}", "NVIDIA H200", 141 << 30, f"0000:{n:02x}:00.0") for n in range(EACH)))


def node_entry(number: int) -> NodeEntry:
    return NodeEntry(node_name(number), "10.0.0.1", "boot", "1", 18090, msgspec.Raw(facts()))


def topology(engines: int, spare: int = 0) -> Topology:
    return parse_text(text(engines, spare), "growth.toml")


def text(engines: int, spare: int = 0) -> str:
    return TOPOLOGY.format(each=engines // 2, spare=spare)


def addresses(entries: list[EngineEntry]):  # type: ignore[no-untyped-def]
    return Others(lambda: tuple(entries)).addresses()


def seconds(work: Callable[[], object], times: int = 5) -> float:
    """The median time of a piece of work."""
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return median(taken)


def memory(make: Callable[[], object]) -> int:
    """Bytes that what it makes holds."""
    tracemalloc.start()
    made = make()
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del made
    return size
