from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from pdctl.commands.setup.default import default_text
from pdctl.errors import ConfigError, PdctlError
from pdctl.host import Gpu, Host, PortHolder
from pdctl.topology.loader import load_file, load_text, port_problems
from pdctl.topology.spec import ApiKey, Device, Role

EXAMPLE = (Path(__file__).parents[2] / "pdctl.toml.example").read_text()
GPUS = tuple(Gpu(n, f"GPU-{n}", "H200", 141 << 30) for n in range(2))


def host(gpus: tuple[Gpu, ...] = (), cpus: tuple[int, ...] = (0, 1)) -> Host:
    root = Path("/nowhere")
    return Host(cpus, gpus, 24 << 30, {}, "/usr/bin/python3", root / "c", root / "r", root / "s")


def problems(text: str, on: Host | None = None) -> list[tuple[int, str, str]]:
    with pytest.raises(ConfigError) as found:
        load_text(text, "x.toml", on or host())
    return [(problem.line, problem.key, problem.message) for problem in found.value.problems]


def line_of(text: str, needle: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if line.startswith(needle))


def test_the_example_is_a_topology_and_says_what_the_issue_says() -> None:
    topology = load_text(EXAMPLE, "pdctl.toml.example", host())
    assert topology.service.name == "demo"
    assert topology.proxy.port == 8000
    assert [(g.name, g.role, g.cpus, g.max_num_seqs) for g in topology.engines] == [
        ("prefill", Role.PREFILL, (0,), 8),
        ("decode", Role.DECODE, (1,), 32),
    ]
    assert topology.engines[1].kv_cache_gb == 1.0, "defaults are filled in"


@pytest.mark.parametrize("gpus", [(), GPUS[:1], GPUS])
@pytest.mark.parametrize("cpus", [(0,), (0, 1), tuple(range(16))])
def test_the_default_fits_every_machine(gpus: tuple[Gpu, ...], cpus: tuple[int, ...]) -> None:
    on = host(gpus, cpus)
    topology = load_text(default_text(on), "default", on)
    wanted = Device.CUDA if gpus else Device.CPU
    assert {group.device for group in topology.engines} == {wanted}


@pytest.mark.parametrize(
    ("old", "new", "line_start", "key", "message"),
    [
        ("port = 8000", "prot = 8000", "prot", "proxy.prot", "unknown key 'prot'"),
        ('backend = "auto"', 'backend = "rdma"', "backend", "transfer.backend", "must be one of: auto, cuda_ipc, shm"),
        ('protocol = "auto"', 'protocol = "rdma"', "protocol", "transfer.protocol", "has no effect with backend"),
        ('protocol = "auto"', 'devices = ["mlx5_0"]', "devices", "transfer.devices", "has no effect with backend"),
        ('protocol = "auto"', "devices = [5]", "devices", "transfer.devices", "RDMA device names"),
        ('protocol = "auto"', "ports = [16000, 16199]", "ports", "transfer.ports", "has no effect with backend"),
        ('protocol = "auto"', "ports = [16000, 16010]", "ports", "transfer.ports", "at least 100 ports"),
        ("lease_s = 30", "lease_s = 0.1", "lease_s", "transfer.lease_s", "greater than 0.5"),
        ("leased_max = 0.75", "leased_max = 2", "leased_max", "transfer.leased_max", "at most 1"),
        ("chunked = true", 'chunked = "yes"', "chunked", "transfer.chunked", "true or false"),
        ("port = 8000", 'port = "8000"', "port", "proxy.port", "whole number"),
        ("port = 8000", "port = true", "port", "proxy.port", "whole number"),
        ("port = 8000", "port = 70000", "port", "proxy.port", "from 1 to 65535"),
        ('tool_parser = "auto"', 'tool_parser = "llama"', "tool_parser", "service.tool_parser", "one of: auto, hermes"),
        (
            'reasoning_parser = "auto"',
            "reasoning_parser = true",
            "reasoning_parser",
            "service.reasoning_parser",
            "think",
        ),
        ("[slo]", "[sla]", "[sla]", "sla", "unknown table"),
        ("ttft_ms = 2000", "ttft_ms = -1", "ttft_ms", "slo.ttft_ms", "greater than 0"),
        (
            'role = "decode"',
            'role = "decoder"',
            'role = "decoder"',
            "engines[1].role",
            "one of: prefill, decode",
        ),
        ('kind = "builtin"', 'kind = "vlllm"', "kind", "engines[0].kind", "one of: builtin"),
        ("kv_cache_gb = 1.0", 'speculative = { kind = "eagle" }', "spec", "engines[0].speculative", "one of: ngram"),
        ("kv_cache_gb = 1.0", 'speculative = "ngram"', "spec", "engines[0].speculative", "must be a table such as"),
        ("kv_cache_gb = 1.0", 'speculative = { kind = "ngram", token = 4 }', "spec", "engines[0].speculative", "token"),
        ("kv_cache_gb = 1.0", 'speculative = { kind = "ngram", tokens = 0 }', "spec", "engines[0].speculative", "1 to"),
        ("kv_cache_gb = 1.0", 'schedule_ahead = "on"', "sched", "engines[0].schedule_ahead", '"auto", true or false'),
        ("kv_cache_gb = 1.0", "schedule_ahead = 1", "sched", "engines[0].schedule_ahead", '"auto", true or false'),
        ('name = "decode"', 'name = "prefill"', 'name = "prefill"', "engines[1].name", "already used by"),
        ('name = "decode"', 'name = "De code"', 'name = "De', "engines[1].name", "lower-case"),
        ("cpus = [1]", "cpus = [9]", "cpus = [9]", "engines[1].cpus", "CPU 9 does not exist"),
        ("cpus = [1]", "cpus = [1, 1]", "cpus = [1, 1]", "engines[1].cpus", "twice"),
        ('model = "sample:gemma-3-270m"', 'model = "./nowhere"', "model", "service.model", "was not found"),
        ('model = "sample:gemma-3-270m"', 'model = "sample:zzz"', "model", "service.model", "unknown sample"),
        (
            "max_num_seqs = 32",
            "max_num_seqs = 0",
            "max_num_seqs = 0",
            "engines[1].max_num_seqs",
            "from 1 to 4096",
        ),
    ],
)
def test_each_mistake_has_its_line_and_key(old: str, new: str, line_start: str, key: str, message: str) -> None:
    text = EXAMPLE.replace(old, new, 1)
    assert text != EXAMPLE
    found = problems(text)
    lines = [number for number, line in enumerate(text.splitlines(), 1) if line.startswith(line_start)]
    assert len(found) == 1
    assert found[0][0] in lines
    assert found[0][1] == key
    assert message in found[0][2]


def test_all_mistakes_come_in_one_run() -> None:
    text = (
        EXAMPLE.replace("port = 8000", "prot = 1").replace("lease_s = 30", "lease_s = 0").replace('role = "decode"', "")
    )
    assert [key for _, key, _ in problems(text)] == ["proxy.prot", "transfer.lease_s", "engines[1]"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ('[service]\nmodel = "sample:tiny-qwen3"\n', "no engines"),
        ('[service]\nmodel = "sample:tiny-qwen3"\nengines = 3\n', "unknown key 'engines'"),
        ('engines = []\n[service]\nmodel = "sample:tiny-qwen3"\n', "no engines"),
        ("[service\n", "not TOML"),
        ("service = 3\n", "must be a table"),
    ],
)
def test_files_that_are_no_topology(text: str, message: str) -> None:
    assert any(message in found for _, _, found in problems(text))


@pytest.mark.parametrize(("role", "other"), [("prefill", "decode"), ("decode", "prefill")])
def test_one_role_without_the_other(role: str, other: str) -> None:
    text = f'[service]\nmodel = "sample:tiny-qwen3"\n[[engines]]\nname = "a"\nrole = "{role}"\n'
    assert problems(text) == [(3, "engines", f"{role} without {other}")]
    load_text(text.replace(f'"{role}"', '"hybrid"'), "x", host())


def cuda(first: str, second: str) -> str:
    return f"""
[service]
model = "sample:tiny-qwen3"
[[engines]]
name = "p"
role = "prefill"
device = "cuda"
{first}
[[engines]]
name = "d"
role = "decode"
device = "cuda"
{second}
"""


def test_gpus_are_checked_against_the_machine() -> None:
    on = host(GPUS)
    assert "GPU 0 is assigned to both p-0 and d-0" in problems(cuda("gpus = [0]", "gpus = [0]"), on)[0][2]
    assert "GPU 7 does not exist" in problems(cuda("gpus = [0]", "gpus = [7]"), on)[0][2]
    assert "2 gpus for 1 replicas" in problems(cuda("gpus = [0, 1]", ""), on)[0][2]
    both = cuda("gpus = [0]\nshare_gpu = true", "gpus = [0]")
    assert "assigned to both" in problems(both, on)[0][2], "both must agree"
    load_text(cuda("gpus = [0]\nshare_gpu = true", "gpus = [0]\nshare_gpu = true"), "x", on)
    load_text(cuda("gpus = [1]", "gpus = [0]"), "x", on)


def test_settings_of_gpus_on_a_cpu_are_refused() -> None:
    text = EXAMPLE.replace('policy = "fcfs"', 'attention = "triton"', 1)
    [(_, key, message)] = problems(text)
    assert key.endswith("attention")
    assert "attention = 'triton' needs a GPU" in message
    load_text(text.replace("triton", "gather"), "x", host(GPUS))
    [(_, key, message)] = problems(EXAMPLE.replace('policy = "fcfs"', "enforce_eager = true", 1))
    assert key.endswith("enforce_eager")
    assert "no effect on a CPU engine" in message
    load_text(cuda('gpus = [0]\nattention = "triton"', "gpus = [1]"), "x", host(GPUS))


def test_gpus_that_are_not_there_and_devices_that_do_not_mix() -> None:
    everywhere = EXAMPLE.replace('device = "cpu"', 'device = "cuda"')
    assert [key for _, key, message in problems(everywhere) if "no GPU was found" in message] == [
        "engines[0].device",
        "engines[1].device",
    ]
    mixed = EXAMPLE.replace('device = "cpu"', 'device = "cuda"', 1)
    assert "cannot hand KV to each other" in problems(mixed, host(GPUS))[0][2]


def test_kv_that_does_not_fit_the_machine() -> None:
    found = problems(EXAMPLE.replace("kv_cache_gb = 1.0", "kv_cache_gb = 400.0"))
    assert [key for _, key, _ in found] == ["engines[0].kv_cache_gb"]
    assert "401 GiB in total, but this machine has 24 GiB" in found[0][2]


def test_a_port_in_use_names_its_holder(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text(EXAMPLE)
    on = replace(host(), listening={8000: PortHolder(41, "python -m http.server")})
    found = port_problems(load_file(file, on), on)
    assert [(p.line, p.key) for p in found] == [(line_of(EXAMPLE, "port = 8000"), "proxy.port")]
    assert "pid 41 (python -m http.server)" in found[0].message


def test_the_built_in_topology_has_a_port_in_use_too() -> None:
    on = replace(host(), listening={8000: PortHolder(7, "nginx")})
    found = port_problems(load_text(default_text(on), "the built-in default", on), on)
    assert [problem.key for problem in found] == ["proxy.port"]
    assert found[0].line > 0


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(PdctlError, match="does not exist"):
        load_file(tmp_path / "no.toml", host())
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PdctlError, match="cannot be read"):
        load_file(tmp_path / "bad.toml", host())


def test_every_key_of_the_schema_is_in_the_example() -> None:
    from pdctl.topology.schema import LISTS, TABLES

    for keys in (*TABLES.values(), *LISTS.values()):
        for name in keys:
            assert re.search(rf"^(# )?{name} = ", EXAMPLE, re.MULTILINE), f"{name} is not shown in pdctl.toml.example"


def pem(folder: Path, name: str) -> tuple[Path, Path]:
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    subprocess.run([*words, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


def with_proxy(tmp_path: Path, lines: str) -> list[tuple[int, str, str]]:
    """The problems of the example file with these lines under [proxy]."""
    path = tmp_path / "pdctl.toml"
    path.write_text(EXAMPLE.replace("port = 8000", f"port = 8000\n{lines}"))
    with pytest.raises(ConfigError) as found:
        load_file(path, host())
    return [(problem.line, problem.key, problem.message) for problem in found.value.problems]


def test_tls_files_are_read_before_anything_starts(tmp_path: Path) -> None:
    cert, key = pem(tmp_path, "a")
    other, _ = pem(tmp_path, "b")
    garbage = tmp_path / "garbage"
    garbage.write_text("not PEM")
    locked = tmp_path / "locked"
    subprocess.run(["openssl", "rsa", "-aes256", "-passout", "pass:x", "-in", key, "-out", locked], check=True)
    for tls_cert, tls_key, wrong, message in (
        (other, key, "tls_key", f"{key} is not the key of {other}"),
        (garbage, key, "tls_cert", "is not a PEM certificate"),
        (cert, garbage, "tls_key", "is not a PEM key"),
        (cert, locked, "tls_key", "without a password"),
    ):
        [(line, found_key, said)] = with_proxy(tmp_path, f'tls_cert = "{tls_cert}"\ntls_key = "{tls_key}"')
        text = (tmp_path / "pdctl.toml").read_text()
        assert (line, found_key) == (line_of(text, wrong), f"proxy.{wrong}")
        assert message in said
    (tmp_path / "pdctl.toml").write_text(
        EXAMPLE.replace("port = 8000", f'port = 8000\ntls_cert = "{cert}"\ntls_key = "{key}"')
    )
    load_file(tmp_path / "pdctl.toml", host())


def test_api_keys_are_read_before_anything_starts(tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text(f"# ours\nalice sha256:{'0' * 64}\nbob md5:1\n")
    [(_, key, message)] = with_proxy(tmp_path, 'api_keys = "keys.txt"')
    assert key == "proxy.api_keys"
    assert message == f"{keys}:3: not NAME sha256:HASH"


def test_settings_are_for_keys_that_exist(tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text(f"alice sha256:{'0' * 64}\nbob sha256:{'1' * 64}\n")
    path = tmp_path / "pdctl.toml"
    entry = '\n[[keys]]\nname = "{}"\n{}\n'
    keys = EXAMPLE.replace("port = 8000", 'port = 8000\napi_keys = "keys.txt"')
    path.write_text(keys + entry.format("alice", "weight = 2\nstreams = 3") + entry.format("*", "priority = 1"))
    assert load_file(path, host()).proxy.keys == (ApiKey("alice", 2.0, streams=3), ApiKey("*", priority=1))
    for text, wrong in (
        (keys + entry.format("carol", ""), "has no key of the name 'carol'"),
        (keys + entry.format("bob", "") + entry.format("bob", ""), "a second entry for 'bob'"),
        (EXAMPLE + entry.format("alice", ""), "[[keys]] has no effect without proxy.api_keys"),
        (keys + entry.format("bob", "weight = 0"), "must be a number greater than 0"),
        (keys + entry.format("bob", "streams = -1"), "must be a whole number, at least 0"),
        (keys + entry.format("bob", "rpm = 3"), "unknown key 'rpm'"),
        (keys + entry.format("b b", ""), "must be the name of an API key, or * for every other key"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError) as found:
            load_file(path, host())
        [problem] = found.value.problems
        assert wrong in problem.message
        assert problem.key.startswith("keys[")


def test_engines_register_themselves_only_with_a_key(tmp_path: Path) -> None:
    [(line, key, message)] = with_proxy(tmp_path, "accept_nodes = true")
    text = (tmp_path / "pdctl.toml").read_text()
    assert (line, key, message) == (line_of(text, "accept_nodes"), "proxy.accept_nodes", "accept_nodes needs node_keys")
    keys = tmp_path / "nodes.keys"
    both = 'accept_nodes = true\nnode_keys = "nodes.keys"'
    [(_, key, message)] = with_proxy(tmp_path, both)
    assert (key, message) == ("proxy.node_keys", f"{keys} does not exist or cannot be read")
    keys.write_text("# none yet\n")
    [(_, key, message)] = with_proxy(tmp_path, both)
    assert (key, message) == ("proxy.node_keys", f"{keys} has no key")
    keys.write_text("box md5:1\n")
    assert [key for _, key, _ in with_proxy(tmp_path, both)] == ["proxy.node_keys"]
    keys.write_text(f"box sha256:{'0' * 64}\n")
    assert [key for _, key, _ in with_proxy(tmp_path, 'node_keys = "nodes.keys"')] == ["proxy.node_keys"]
    path = tmp_path / "pdctl.toml"
    path.write_text(EXAMPLE.replace("port = 8000", f"port = 8000\n{both}"))
    assert load_file(path, host()).proxy.node_keys == str(keys)


@pytest.mark.parametrize("engines", ["", '[[engines]]\nname = "p"\nrole = "prefill"'])
def test_engines_that_register_themselves_need_not_be_in_the_file(tmp_path: Path, engines: str) -> None:
    (tmp_path / "nodes.keys").write_text(f"box sha256:{'0' * 64}\n")
    path, text = tmp_path / "pdctl.toml", f'[service]\nmodel = "sample:tiny-qwen3"\n{engines}\n[proxy]\n'
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_file(path, host())
    path.write_text(f'{text}accept_nodes = true\nnode_keys = "nodes.keys"\n')
    assert len(load_file(path, host()).engines) == bool(engines)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text(f"alice sha256:{'0' * 64}\n", encoding="utf-8-sig")
    path = tmp_path / "pdctl.toml"
    path.write_text(EXAMPLE.replace("port = 8000", 'port = 8000\napi_keys = "keys.txt"'), encoding="utf-8-sig")
    assert load_file(path, host()).proxy.api_keys == str(tmp_path / "keys.txt")


@pytest.mark.parametrize("name", ["", "A=B", "A\\u0000B"])
def test_an_environment_has_names_that_the_kernel_takes(name: str) -> None:
    text = EXAMPLE.replace('name = "prefill"', f'name = "prefill"\nenv = {{ "{name}" = "x" }}', 1)
    [(_, key, message)] = problems(text)
    assert key == "engines[0].env"
    assert "which is not a valid variable name" in message


def test_packages_that_engines_need_are_missed_before_anything_starts() -> None:
    [(line, key, message)] = problems(EXAMPLE, replace(host(), missing_packages=frozenset({"zmq", "torch"})))
    assert (line, key) == (line_of(EXAMPLE, "[[engines]]"), "engines[0]")
    assert message.endswith("not installed: torch, zmq")


@pytest.mark.parametrize("value", [r"\u0000", "y" * 5000, "a/" + "y" * 256, r"a\nb"])
@pytest.mark.parametrize(("table", "key"), [("service", "model"), ("proxy", "api_keys"), ("proxy", "access_log")])
def test_texts_that_can_be_no_path_are_refused(table: str, key: str, value: str) -> None:
    text = '[service]\nmodel = "m"\n[proxy]\n'
    text = text.replace('model = "m"', f'model = "{value}"') if key == "model" else f'{text}{key} = "{value}"\n'
    assert f"{table}.{key}" in [where for _, where, _ in problems(text)]


@pytest.mark.parametrize("key", ["tool_parser", "reasoning_parser"])
@pytest.mark.parametrize(
    "engine", ['kind = "vllm"', 'url = "http://127.0.0.1:9"', 'kind = "vllm"\nurl = "http://127.0.0.1:9"']
)
def test_parsers_are_for_builtin_engines_that_pdctl_starts(key: str, engine: str) -> None:
    text = (
        f'[service]\nmodel = "sample:tiny-qwen3"\n{key} = "none"\n[[engines]]\nname = "a"\nrole = "hybrid"\n{engine}\n'
    )
    line, where, message = next(problem for problem in problems(text) if problem[1].startswith("service"))
    assert (line, where) == (3, f"service.{key}")
    assert message.startswith(f"{key} has no effect")
    if "url" in engine:
        load_text(f'{text}[[engines]]\nname = "b"\nrole = "hybrid"\n', "x", host())
