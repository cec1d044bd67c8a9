from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pdctl.errors import PdctlError
from pdctl.host import PortHolder
from pdctl.loader import load_text
from pdctl.plan import Plan, make_plan
from tests.test_loader import EXAMPLE, GPUS, cuda, host

SNAPSHOT = Path(__file__).parent / "plan_snapshot.json"


def shown(plan: Plan) -> dict[str, object]:
    """Without the topology's own text, which is the example."""
    return {name: value for name, value in plan.to_dict().items() if name != "text"}


def test_the_examples_plan_is_what_it_was() -> None:
    """After a wanted change: python -m tests.test_plan writes the snapshot anew; read its diff."""
    plan = make_plan(load_text(EXAMPLE, "/x/pdctl.toml", host()), host())
    assert json.loads(json.dumps(shown(plan))) == json.loads(SNAPSHOT.read_text())


def test_a_plan_is_pure() -> None:
    topology = load_text(EXAMPLE, "/x/pdctl.toml", host())
    assert make_plan(topology, host()) == make_plan(topology, host())


def test_engines_avoid_ports_that_are_taken() -> None:
    topology = load_text(EXAMPLE, "x", host())
    first = make_plan(topology, host()).processes[0].ports["http"]
    busy = replace(host(), listening={first: PortHolder(1, "x")})
    ports = [spec.ports["http"] for spec in make_plan(topology, busy).processes]
    assert first not in ports
    assert len(set(ports)) == 3


def test_gpus_are_pinned_by_uuid_and_free_ones_are_chosen_in_order() -> None:
    on = host(GPUS)
    plan = make_plan(load_text(cuda("gpus = [1]", ""), "x", on), on)
    assert [spec.gpus for spec in plan.processes] == [("GPU-1",), ("GPU-0",), ()]
    assert plan.processes[0].env["CUDA_VISIBLE_DEVICES"] == "GPU-1"
    with pytest.raises(PdctlError, match="no GPU is left for d-1"):
        make_plan(load_text(cuda("gpus = [1]", "replicas = 2"), "x", on), on)


def test_cpu_engines_see_no_gpu_and_use_one_thread() -> None:
    plan = make_plan(load_text(EXAMPLE, "x", host(GPUS)), host(GPUS))
    for spec in plan.processes[:2]:
        assert spec.env["CUDA_VISIBLE_DEVICES"] == ""
        assert spec.env["OMP_NUM_THREADS"] == "1"


def test_replicas_share_their_groups_cpus_evenly() -> None:
    on = host(cpus=tuple(range(8)))
    text = EXAMPLE.replace("cpus = [1]", "cpus = [4, 5, 6, 7]\n").replace(
        'role = "decode"\nreplicas = 1', 'role = "decode"\nreplicas = 2'
    )
    plan = make_plan(load_text(text, "x", on), on)
    assert [spec.cpus for spec in plan.processes if spec.role == "decode"] == [(4, 5), (6, 7)]


def test_the_proxy_waits_for_every_engine_and_owns_no_socket_of_its_own() -> None:
    plan = make_plan(load_text(EXAMPLE, "x", host()), host())
    proxy = plan.processes[-1]
    assert proxy.depends_on == ("prefill-0", "decode-0")
    assert proxy.listen == ("127.0.0.1", 8000)
    assert all(spec.listen is None for spec in plan.processes[:-1])


def test_no_secret_in_a_plan() -> None:
    assert "secret" not in json.dumps(shown(make_plan(load_text(EXAMPLE, "x", host()), host()))).lower()


if __name__ == "__main__":
    made = make_plan(load_text(EXAMPLE, "/x/pdctl.toml", host()), host())
    SNAPSHOT.write_text(json.dumps(shown(made), indent=1) + "\n")
