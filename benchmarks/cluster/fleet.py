"""A cluster that exists only as what its nodes tell: 8 engines a node, half of them prefill."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from statistics import median

import msgspec

from pdctl.host import Gpu, Host
from pdctl.host.facts import encode_facts
from pdctl.proxy_wire import EngineAddress
from pdctl.supervisor.cluster.entries import EngineEntry, Keys, NodeEntry
from pdctl.supervisor.service.others import Others
from tests.topology.test_loader import host

EACH = 8
KEYS = Keys("growth")
_TOPOLOGY = """
[service]
name = "growth"
model = "sample:tiny-qwen3"
[cluster]
etcd = ["http://127.0.0.1:2379"]
interface = "eth0"
secret_file = "secret"
spare_nodes = {spare}
cells = [{cells}]
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
    """32 nodes a rack: with 8 engines each, 256 engines."""
    return f"rack{number // 32:02}-{number:04}"


def cells(nodes: int) -> tuple[str, ...]:
    """A cell for each rack."""
    return tuple(f"rack{number:02}-*" for number in range(-(-nodes // 32)))


def engine(number: int, place: int, name: str) -> EngineEntry:
    """An engine on a node, at one of its eight places."""
    role = name.rpartition("-")[0]
    address = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
    epoch = f"{number:08x}-{place:012x}"
    return EngineEntry(node_name(number), name, "builtin", role, address, 18100 + place, epoch, inline=role == "decode")


def fleet(engines: int) -> list[EngineEntry]:
    """All engines, as they are placed."""
    return [
        engine(number, place, f"{('prefill', 'decode')[place % 2]}-{(number * EACH + place) // 2}")
        for number in range(engines // EACH)
        for place in range(EACH)
    ]


def node_host() -> Host:
    """The facts of a node with eight GPUs."""
    gpus = (Gpu(n, f"GPU-0123456789abcdef-{n}", "NVIDIA H200", 141 << 30, f"0000:{n:02x}:00.0") for n in range(EACH))
    return host(tuple(gpus), tuple(range(96)))


def node_entry(number: int, cell: str = "") -> NodeEntry:
    """What a node tells of itself."""
    return NodeEntry(node_name(number), "10.0.0.1", "boot", "1", 18090, msgspec.Raw(encode_facts(node_host())), cell)


def text(engines: int, spare: int = 0, racks: tuple[str, ...] = ()) -> str:
    """The topology."""
    return _TOPOLOGY.format(each=engines // 2, spare=spare, cells=", ".join(f'"{rack}"' for rack in racks))


def addresses(entries: list[EngineEntry]) -> list[EngineAddress]:
    """As the proxies get them."""
    return Others(lambda: tuple(entries)).addresses()


def seconds(work: Callable[[], object], times: int = 5) -> float:
    """The median CPU time of a piece of work: the machine may have other work."""
    taken = []
    for _ in range(times):
        begun = time.process_time()
        work()
        taken.append(time.process_time() - begun)
    return median(taken)


def memory(make: Callable[[], object]) -> int:
    """Bytes that what it makes holds."""
    tracemalloc.start()
    made = make()
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del made
    return size
