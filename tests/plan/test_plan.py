from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pdctl.errors import ConfigError, PdctlError
from pdctl.host import Holder, Host, PortHolder
from pdctl.plan import Plan, make_plan
from pdctl.topology.loader import load_text
from tests.topology.test_loader import EXAMPLE, GPUS, cuda, host

SNAPSHOT = Path(__file__).parent / "plan_snapshot.json"


def shown(plan: Plan) -> dict[str, object]:
    """The plan without the topology's text, which is the example file."""
    return {name: value for name, value in plan.to_dict().items() if name != "text"}


def test_the_examples_plan_is_what_it_was() -> None:
    """After an intended change, python -m tests.plan.test_plan rewrites the snapshot; check its diff."""
    plan = make_plan(load_text(EXAMPLE, "/x/pdctl.toml", host()), host())
    assert json.loads(json.dumps(shown(plan))) == json.loads(SNAPSHOT.read_text())


def test_engines_export_spans_if_their_environment_can() -> None:
    """Each kind by its own options, and all by the same variables."""
    text = """
[service]
name = "s"
model = "sample:tiny-qwen3"
[proxy]
otlp_endpoint = "http://c:4318/"
[[engines]]
name = "KIND"
role = "hybrid"
kind = "KIND"
"""
    url = "http://c:4318/v1/traces"
    expected = {
        "builtin": ("--otlp-endpoint", "http://c:4318/"), "vllm": ("--otlp-traces-endpoint", url),
        "sglang": ("--enable-trace", "--otlp-traces-endpoint", url), "lmdeploy": (),
    }  # fmt: skip
    for has_exporters in (True, False):
        def package_in(_: str, names: tuple[str, ...], has: bool = has_exporters) -> tuple[str, str] | None:
            known = names and (has or not names[0].startswith("opentelemetry"))
            return (names[0], "0.30.0") if known else None

        for kind, options in expected.items():
            on = replace(host(GPUS), package_in=package_in)
            found = make_plan(load_text(text.replace("KIND", kind), "x", on), on).processes[0]
            wanted = options if has_exporters else ()
            assert all(option in found.argv for option in wanted)
            assert any("otlp" in word for word in found.argv) == bool(wanted)
            assert found.env.get("OTEL_SERVICE_NAME") == (f"pdctl/s/{found.name}" if wanted else None)
            assert ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL" in found.env) == bool(wanted)


def test_a_plan_is_pure() -> None:
    topology = load_text(EXAMPLE, "/x/pdctl.toml", host())
    assert make_plan(topology, host()) == make_plan(topology, host())


def test_engines_avoid_ports_that_are_taken() -> None:
    topology = load_text(EXAMPLE, "x", host())
    first = make_plan(topology, host()).processes[0].ports["http"]
    for busy in (
        replace(host(), listening={first: PortHolder(1, "x")}), replace(host(), claimed=frozenset({first}))
    ):  # fmt: skip
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


def test_data_parallel_makes_engines_of_a_replica_with_an_endpoint_each() -> None:
    on = host(cpus=tuple(range(8)))
    text = EXAMPLE.replace('role = "decode"\nreplicas = 1', 'role = "decode"\nreplicas = 2\ndata_parallel = 2')
    plan = make_plan(load_text(text, "x", on), on)
    decodes = [spec for spec in plan.processes if spec.role == "decode"]
    assert [spec.name for spec in decodes] == ["decode-0", "decode-1", "decode-2", "decode-3"]
    assert len({spec.ports["http"] for spec in decodes}) == 4
    alone = text.replace("data_parallel = 2", "")
    assert len(make_plan(load_text(alone, "x", on), on).processes) == len(plan.processes) - 2


def test_the_proxy_waits_for_every_engine_and_owns_no_socket_of_its_own() -> None:
    plan = make_plan(load_text(EXAMPLE, "x", host()), host())
    proxy = plan.processes[-1]
    assert proxy.depends_on == ("prefill-0", "decode-0")
    assert proxy.listen == ("127.0.0.1", 8000)
    assert all(spec.listen is None for spec in plan.processes[:-1])


def test_no_secret_in_a_plan() -> None:
    assert "secret" not in json.dumps(shown(make_plan(load_text(EXAMPLE, "x", host()), host()))).lower()


def on_gpus(gpu_holders: dict[str, tuple[Holder, ...]] | None = None) -> Host:
    return replace(host(gpus=GPUS), gpu_holders=gpu_holders or {})


def gpus_of(plan: Plan) -> list[tuple[str, ...]]:
    return [spec.gpus for spec in plan.processes if spec.kind != "proxy"]


TWO = cuda("", "")


def test_idle_gpus_first_and_the_reason_is_told() -> None:
    busy = on_gpus(gpu_holders={"GPU-0": (Holder(77, "python train.py"),)})
    text = TWO.partition("[[engines]]")
    one = text[0] + '[[engines]]\nname = "h"\nrole = "hybrid"\ndevice = "cuda"\n'
    plan = make_plan(load_text(one, "x", busy), busy)
    assert gpus_of(plan) == [("GPU-1",)]
    assert plan.processes[0].why["gpus"] == "the first idle GPU"
    both = make_plan(load_text(TWO, "x", busy), busy)
    assert gpus_of(both) == [("GPU-1",), ("GPU-0",)]
    assert both.processes[1].why["gpus"] == "the first free GPU; in use by pid 77 (python train.py)"


def test_a_named_busy_gpu_is_used_and_says_who() -> None:
    busy = on_gpus(gpu_holders={"GPU-0": (Holder(77, "vllm", "/run/pdctl/other"),)})
    text = cuda("gpus = [0]", 'gpus = ["GPU-1"]')
    plan = make_plan(load_text(text, "x", busy), busy)
    assert gpus_of(plan) == [("GPU-0",), ("GPU-1",)]
    reason = "named in the topology; in use by pid 77 (vllm, of the pdctl service 'other')"
    assert plan.processes[0].why["gpus"] == reason


def test_our_own_engines_do_not_make_a_gpu_busy() -> None:
    first = make_plan(load_text(TWO, "x", on_gpus()), on_gpus())
    ours = on_gpus(gpu_holders={"GPU-0": (Holder(77, "python", first.run_dir),)})
    assert gpus_of(make_plan(load_text(TWO, "x", ours), ours)) == [("GPU-0",), ("GPU-1",)]


def test_only_what_the_environment_leaves_us_is_used() -> None:
    given = replace(host(gpus=(GPUS[1],)), gpus_by="CUDA_VISIBLE_DEVICES=GPU-1")
    with pytest.raises(PdctlError, match="1 available through CUDA_VISIBLE_DEVICES=GPU-1"):
        make_plan(load_text(TWO, "x", given), given)
    with pytest.raises(ConfigError) as found:
        load_text(cuda("gpus = [0]", "gpus = [1]"), "x", given)
    [problem] = found.value.problems
    assert problem.message == "GPU 0 is not available to pdctl"
    assert problem.hint == "available through CUDA_VISIBLE_DEVICES=GPU-1: 1"
    none = replace(host(), gpus_by="CUDA_VISIBLE_DEVICES=-1")
    with pytest.raises(ConfigError) as found:
        load_text(TWO, "x", none)
    assert {problem.message for problem in found.value.problems} == {"the environment makes no GPU available"}


def test_engines_listen_within_the_topologys_ports() -> None:
    text = EXAMPLE.replace('name = "demo"', 'name = "demo"\nengine_ports = [31000, 31001]')
    plan = make_plan(load_text(text, "/x/pdctl.toml", host()), host())
    assert [spec.ports["http"] for spec in plan.processes if spec.kind != "proxy"] == [31000, 31001]
    narrow = text.replace("31001", "31000")
    with pytest.raises(PdctlError, match="no free port from 31000 to 31000"):
        make_plan(load_text(narrow, "/x/pdctl.toml", host()), host())


if __name__ == "__main__":
    made = make_plan(load_text(EXAMPLE, "/x/pdctl.toml", host()), host())
    SNAPSHOT.write_text(json.dumps(shown(made), indent=1) + "\n")
