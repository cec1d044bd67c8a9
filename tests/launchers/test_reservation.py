"""What the agents of a service need of which node."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from pdctl.errors import PdctlError
from pdctl.launchers.launcher import Wanted
from pdctl.launchers.reservation import Bundle, Offer, bundles_of, check_fits, node_names, portable, wanted_of
from pdctl.plan.placement import Wish
from pdctl.topology.loader import load_cluster_text

TEXT = """
[service]
name = "s"
model = "m"
[cluster]
etcd = ["http://10.0.0.1:2379"]   # one member
interface = "eth0"
secret_file = "the secret"        # beside this file
launcher = "ray"
ray_token_file = "~/ray.token"
spare_nodes = 1
[proxy]
nodes = ["a"]
[[engines]]
name = "prefill"
role = "prefill"
replicas = 2
device = "cuda"
tensor_parallel = 2
kind = "vllm"
nodes = ["a", "b"]
[[engines]]
name = "decode"
role = "decode"
cpus = [0, 1, 2]
device = "cuda"
kind = "vllm"
[[engines]]
name = "elsewhere"
role = "decode"
kind = "vllm"
url = "http://10.0.0.9:8000"
"""


def offer(node: str, gpus: int = 8, free: int | None = None, cpus: int = 64, is_here: bool = False) -> Offer:
    return Offer(node, f"10.0.0.{ord(node)}", (gpus if free is None else free, gpus), (cpus, 64), is_here)


def wanted(*wishes: Wish, spare: int = 0, proxies: tuple[str, ...] = ()) -> Wanted:
    return Wanted("s", "", wishes, {wish.name: 1 for wish in wishes}, spare, proxies)


def pair(gpus: int, replicas: int = 1) -> list[Wish]:
    return [Wish(f"{role}-{n}", role, role, gpus) for role in ("prefill", "decode") for n in range(replicas)]


def reserved(bundles: list[Bundle]) -> dict[str, tuple[int, int]]:
    return {bundle.node: (bundle.gpus, bundle.cpus) for bundle in bundles}


def test_a_node_reserves_what_its_engines_need() -> None:
    bundles = bundles_of([offer("a"), offer("b"), offer("c", free=3)], wanted(*pair(4, replicas=2)))
    # Each has a prefill and a decode engine of 4 GPUs; a CPU for each, and one for the agent.
    assert reserved(bundles) == {"a": (8, 3), "b": (8, 3)}
    assert [bundle.address for bundle in bundles] == ["10.0.0.97", "10.0.0.98"]


def test_gpus_that_other_jobs_have_are_not_asked_for() -> None:
    bundles = bundles_of([offer("a", free=1), offer("b", free=6)], wanted(*pair(2)))
    assert reserved(bundles) == {"b": (4, 3)}


def test_what_is_missing_is_said_with_what_there_is() -> None:
    with pytest.raises(PdctlError, match=r"no node has 8 free GPUs for decode-0; free: a 0 of 8, b 6 of 6"):
        bundles_of([offer("a"), offer("b", gpus=8, free=6)], wanted(*pair(8)))
    with pytest.raises(PdctlError, match=r"node a has 2 of 64 CPUs free, and 3 are needed"):
        bundles_of([offer("a", cpus=2)], wanted(*pair(0)))
    with pytest.raises(PdctlError, match=r"\[proxy\] nodes names z, which is no node"):
        bundles_of([offer("a")], wanted(*pair(0), proxies=("z",)))
    with pytest.raises(PdctlError, match=r"no such node is there \(known: none\)"):
        bundles_of([], wanted(*pair(0)))


def test_the_node_of_the_command_and_those_of_proxies_have_agents_too() -> None:
    offers = [offer("a"), offer("b", gpus=0, is_here=True), offer("c", gpus=0), offer("d", gpus=0)]
    assert reserved(bundles_of(offers, wanted(*pair(4), proxies=("c",)))) == {"a": (8, 3), "b": (0, 1), "c": (0, 1)}


def test_engines_that_share_gpus_need_those_of_the_largest() -> None:
    shared = [Wish("a", "a", "prefill", 2), Wish("b", "b", "decode", 4, shares=True)]
    assert reserved(bundles_of([offer("a")], wanted(*shared))) == {"a": (4, 3)}


@given(st.lists(st.integers(0, 8), min_size=1, max_size=9), st.lists(st.integers(0, 8), min_size=1, max_size=4))
def test_what_is_reserved_has_room_for_all(sizes: list[int], free: list[int]) -> None:
    engines = [Wish(f"e-{n}", f"g{size}", "decode", size) for n, size in enumerate(sizes)]
    offers = [offer(node, free=gpus) for node, gpus in zip("abcd", free, strict=False)]
    try:
        bundles = bundles_of(offers, wanted(*engines))
    except PdctlError:
        return
    check_fits(bundles, wanted(*engines))


def test_spare_nodes_take_all_free_gpus_where_engines_may_run() -> None:
    wishes = [Wish("p", "p", "prefill", 4, ("a", "b")), Wish("d", "d", "decode", 4, ("a", "b"))]
    bundles = bundles_of([offer("a"), offer("b", free=8), offer("c")], wanted(*wishes, spare=1))
    assert {bundle.node: bundle.gpus for bundle in bundles} == {"a": 8, "b": 8}
    with pytest.raises(PdctlError, match=r"without a, no node has 4 free GPUs"):
        bundles_of([offer("a"), offer("b", free=3)], wanted(*wishes, spare=1))
    on_cpus = bundles_of([offer("a"), offer("b")], wanted(*pair(0), spare=1))
    assert {bundle.node: bundle.gpus for bundle in on_cpus} == {"a": 0, "b": 0}


def test_a_reservation_that_is_there_must_do() -> None:
    held = [Bundle("a", "10.0.0.1", 8, 3)]
    check_fits(held, wanted(*pair(4)))
    with pytest.raises(PdctlError, match=r"in what was reserved for this service: no node has 8 free GPUs") as failure:
        check_fits(held, wanted(*pair(8)))
    assert failure.value.hint == "what is reserved does not grow: pdctl down, then up"
    with pytest.raises(PdctlError, match=r"names b, which is no node"):
        check_fits(held, wanted(*pair(1), proxies=("b",)))


def test_nodes_are_named_as_their_hosts_unless_two_are_alike() -> None:
    assert node_names([("a.example.org", "10.0.0.1"), ("b", "10.0.0.2")]) == ["a", "b"]
    assert node_names([("gpu", "10.0.0.1"), ("gpu", "fd00::2"), ("c", "10.0.0.3")]) == [
        "gpu-10-0-0-1", "gpu-fd00--2", "c"
    ]  # fmt: skip


def test_a_topology_says_what_is_wanted(tmp_path: Path) -> None:
    made = wanted_of(load_cluster_text(TEXT, str(tmp_path / "t.toml")))
    assert [(wish.name, wish.gpus, wish.nodes) for wish in made.engines] == [
        ("prefill-0", 2, ("a", "b")), ("prefill-1", 2, ("a", "b")), ("decode-0", 1, ())
    ]  # fmt: skip
    assert made.cpus == {"prefill-0": 1, "prefill-1": 1, "decode-0": 3}
    assert (made.service, made.spare, made.proxies, made.allow_commands) == ("s", 1, ("a",), False)


def test_a_file_for_other_folders_has_absolute_paths_and_nothing_else_changes(tmp_path: Path) -> None:
    before = load_cluster_text(TEXT, str(tmp_path / "t.toml"))
    assert before.cluster is not None
    text = portable(TEXT, before.cluster)
    assert load_cluster_text(text, "/elsewhere/x.toml").cluster == before.cluster
    changed = [(old, new) for old, new in zip(TEXT.splitlines(), text.splitlines(), strict=True) if old != new]
    assert [new for _, new in changed] == [
        f'secret_file = "{tmp_path}/the secret"', f'ray_token_file = "{Path.home()}/ray.token"'
    ]  # fmt: skip


def test_a_path_that_cannot_be_made_absolute_is_refused(tmp_path: Path) -> None:
    inline = """
        cluster = { etcd = ["http://10.0.0.1:2379"], interface = "eth0", secret_file = "x", launcher = "ray" }
        service = { name = "s", model = "m" }
        engines = [{ name = "prefill", role = "prefill" }, { name = "decode", role = "decode" }]
    """
    topology = load_cluster_text(inline, str(tmp_path / "t.toml"))
    assert topology.cluster is not None
    with pytest.raises(PdctlError, match="secret_file cannot be given to other nodes"):
        portable(inline, topology.cluster)
    absolute = inline.replace('"x"', '"/x"')
    topology = load_cluster_text(absolute, str(tmp_path / "t.toml"))
    assert topology.cluster is not None
    assert tomli.loads(portable(absolute, topology.cluster)) == tomli.loads(absolute)
