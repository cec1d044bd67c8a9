from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pdctl.host import Gpu, Holder, Host
from pdctl.host.devices.gpu import DISTANCES
from pdctl.host.devices.pci import Layout
from pdctl.host.devices.rdma import RdmaDevice
from pdctl.plan import Plan, make_plan
from pdctl.plan.pins import ACROSS_SOCKETS
from pdctl.topology.loader import load_text

GPUS = tuple(Gpu(n, f"GPU-{n}", "H100", 80 << 30, f"0000:{n}0:00.0") for n in range(4))
LAYOUT = Layout(
    nodes={gpu.pci: gpu.index // 2 for gpu in GPUS},
    cpus={0: (0, 1, 2, 3), 1: (4, 5, 6, 7)},
    classes={
        (gpu.pci, f"mlx5_{n}"): "PIX" if gpu.index == n else "NODE" if gpu.index // 2 == n // 2 else "SYS"
        for gpu in GPUS
        for n in range(4)
    },
)
TEXT = """
[service]
model = "sample:tiny-qwen3"
[transfer]
backend = "mooncake"
protocol = "rdma"
[[engines]]
name = "prefill"
role = "prefill"
device = "cuda"
replicas = 2
[[engines]]
name = "decode"
role = "decode"
device = "cuda"
gpus = [3]
"""


def host(tmp_path: Path, cpus: tuple[int, ...] = tuple(range(8)), down: tuple[int, ...] = ()) -> Host:
    rdma = tuple(RdmaDevice(f"mlx5_{n}", f"0000:{n}1:00.0", n not in down) for n in range(4))
    return Host(cpus, GPUS, 1 << 40, {}, "python3", tmp_path, tmp_path, tmp_path, rdma, LAYOUT)


def plan(tmp_path: Path, text: str = TEXT, on: Host | None = None, running: Plan | None = None) -> Plan:
    on = on or host(tmp_path)
    return make_plan(load_text(text, "x.toml", on), on, running)


def pins(found: Plan) -> dict[str, tuple[tuple[str, ...], tuple[int, ...], tuple[str, ...]]]:
    return {spec.name: (spec.gpus, spec.cpus, spec.rdma) for spec in found.processes if spec.kind != "proxy"}


def test_each_engine_gets_the_cpus_and_the_nic_of_its_gpu(tmp_path: Path) -> None:
    found = plan(tmp_path)
    assert pins(found) == {
        "prefill-0": (("GPU-0",), (0, 1, 2, 3), ("mlx5_0",)),
        "prefill-1": (("GPU-1",), (0, 1, 2, 3), ("mlx5_1",)),
        "decode-0": (("GPU-3",), (4, 5, 6, 7), ("mlx5_3",)),
    }
    decode = found.processes[2]
    assert decode.why["cpus"] == "NUMA node 1, local to its GPU"
    assert decode.why["rdma"].startswith("PIX from its GPU")
    assert decode.why["gpus"] == "named in the topology, at 0000:30:00.0"
    at = decode.argv.index("--transfer-devices")
    assert decode.argv[at + 1] == "mlx5_3"


def test_a_nic_that_is_down_is_passed_over(tmp_path: Path) -> None:
    found = plan(tmp_path, on=host(tmp_path, down=(3,)))
    assert pins(found)["decode-0"][2] == ("mlx5_2",)
    assert found.processes[2].why["rdma"].startswith("NODE from its GPU")


def test_nics_that_the_environment_names_are_all_there_are(tmp_path: Path) -> None:
    on = host(tmp_path)
    on = replace(on, rdma=on.rdma[:1], rdma_by="MC_TE_FILTERS=mlx5_0")
    found = plan(tmp_path, on=on)
    assert {engine.rdma for engine in found.processes if engine.kind != "proxy"} == {("mlx5_0",)}
    assert "available through MC_TE_FILTERS=mlx5_0" in found.processes[2].why["rdma"]


def test_only_cpus_that_are_allowed(tmp_path: Path) -> None:
    found = plan(tmp_path, on=host(tmp_path, cpus=(2, 3, 4)))
    assert pins(found)["prefill-0"][1] == (2, 3)
    assert pins(found)["decode-0"][1] == (4,)


def test_what_the_topology_names_goes_before(tmp_path: Path) -> None:
    text = TEXT.replace('protocol = "rdma"', 'protocol = "rdma"\ndevices = ["mlx5_1"]')
    found = plan(tmp_path, text.replace("gpus = [3]", "gpus = [3]\ncpus = [0]"))
    assert pins(found)["decode-0"] == (("GPU-3",), (0,), ("mlx5_1",))


def test_without_rdma_nothing_is_chosen(tmp_path: Path) -> None:
    found = plan(tmp_path, TEXT.replace('backend = "mooncake"\nprotocol = "rdma"', 'backend = "shm"'))
    assert pins(found)["decode-0"][2] == ()
    bare = replace(host(tmp_path), rdma=(), layout=Layout())
    assert pins(plan(tmp_path, on=bare))["decode-0"] == (("GPU-3",), tuple(range(8)), ())


def test_what_runs_keeps_its_place(tmp_path: Path) -> None:
    before = plan(tmp_path)
    fewer = plan(tmp_path, TEXT.replace("replicas = 2", "replicas = 1"), running=before)
    more = plan(
        tmp_path, TEXT.replace("gpus = [3]", "gpus = [3]\n").replace("replicas = 2", "replicas = 3"), running=fewer
    )
    assert pins(fewer)["prefill-0"] == pins(before)["prefill-0"] == pins(more)["prefill-0"]
    ports = {spec.name: spec.ports for spec in before.processes}
    assert {spec.name: spec.ports for spec in more.processes if spec.name in ports and spec.name != "prefill-1"} == {
        name: port for name, port in ports.items() if name != "prefill-1"
    }
    assert len({spec.ports["http"] for spec in more.processes}) == len(more.processes)
    # The first GPU in the order is used by others, the other engine's is not.
    text = (
        TEXT.replace('name = "prefill"', 'name = "a"')
        + '[[engines]]\nname = "prefill"\nrole = "prefill"\ndevice = "cuda"\n'
    )
    moved = plan(tmp_path, text.replace("replicas = 2\n", ""), running=fewer)
    assert pins(moved)["prefill-0"][0] == ("GPU-0",)
    assert pins(moved)["a-0"][0] == ("GPU-1",)


def linked(*pairs: tuple[int, int]) -> tuple[Gpu, ...]:
    """GPUs of which these pairs have NVLink; others are across sockets if their halves differ, else at one switch."""
    near = {frozenset(pair) for pair in pairs}

    def distance(one: Gpu, other: Gpu) -> int:
        if {one.index, other.index} in near:
            return 0
        return DISTANCES.index("PIX" if one.index // 2 == other.index // 2 else "SYS")

    return tuple(
        replace(one, distances=tuple((other.uuid, distance(one, other)) for other in GPUS if other != one))
        for one in GPUS
    )


def wide(tmp_path: Path, gpus: tuple[Gpu, ...], keys: str = "", busy: tuple[str, ...] = ()) -> Plan:
    """A plan of two engines with two GPUs each."""
    text = (
        '[service]\nmodel = "sample:tiny-qwen3"\n[[engines]]\nname = "e"\nrole = "hybrid"\nkind = "vllm"\n'
        f'device = "cuda"\ntensor_parallel = 2\nreplicas = 2\n{keys}\n'
    )
    holders: dict[str, tuple[Holder, ...]] = {uuid: (Holder(77, "train.py"),) for uuid in busy}
    on = replace(host(tmp_path), gpus=gpus, gpu_holders=holders, package_in=lambda python, names: ("vllm", "0.32.0"))
    return make_plan(load_text(text, "x.toml", on), on)


def gpus_of(found: Plan) -> list[tuple[str, ...]]:
    return [spec.gpus for spec in found.processes if spec.kind != "proxy"]


def test_an_engine_with_several_gpus_gets_those_that_are_nearest(tmp_path: Path) -> None:
    assert gpus_of(wide(tmp_path, GPUS)) == [("GPU-0", "GPU-1"), ("GPU-2", "GPU-3")], "in order, if nothing is known"
    assert gpus_of(wide(tmp_path, linked((0, 3), (1, 2)))) == [("GPU-0", "GPU-3"), ("GPU-1", "GPU-2")]
    assert gpus_of(wide(tmp_path, linked((2, 3)))) == [("GPU-2", "GPU-3"), ("GPU-0", "GPU-1")]


def test_idle_gpus_go_before_near_ones(tmp_path: Path) -> None:
    found = wide(tmp_path, linked((0, 1), (2, 3)), busy=("GPU-1", "GPU-2"))
    assert gpus_of(found) == [("GPU-0", "GPU-3"), ("GPU-1", "GPU-2")]


def test_the_reason_says_how_gpus_are_connected(tmp_path: Path) -> None:
    first, second = (spec.why["gpus"] for spec in wide(tmp_path, linked((0, 1))).processes[:2])
    assert first.endswith("; connected by NVLink")
    assert second.endswith("; connected by PIX")
    named = wide(tmp_path, linked((0, 1)), "gpus = [0, 2, 1, 3]").processes[0].why["gpus"]
    assert named.endswith(ACROSS_SOCKETS)


def test_what_is_not_known_is_not_near(tmp_path: Path) -> None:
    some = (replace(GPUS[0], distances=(("GPU-3", 2),)), *GPUS[1:3], replace(GPUS[3], distances=(("GPU-0", 2),)))
    found = wide(tmp_path, some)
    assert gpus_of(found) == [("GPU-0", "GPU-3"), ("GPU-1", "GPU-2")]
    first, second = (spec.why["gpus"] for spec in found.processes[:2])
    assert first.endswith("; connected by PIX")
    assert "connected" not in second
