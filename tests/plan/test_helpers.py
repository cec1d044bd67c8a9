"""How stores and commands are planned, and what their engines get of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pdctl.errors import ConfigError
from pdctl.host import Host
from pdctl.plan import Plan, ProcessSpec, make_plan
from pdctl.plan.changes import diff
from pdctl.topology.loader import load_text
from tests.topology.test_loader import GPUS, host

COMMANDS = """
[service]
model = "sample:tiny-qwen3"
[proxy]
workers = 2
[[engines]]
name = "h"
role = "hybrid"
depends_on = ["tokenizer"]
[[processes]]
name = "exporter"
command = ["sh", "serve", "--listen={port}", "--metrics={port:metrics}"]
env = { METRICS = "http://127.0.0.1:{port:metrics}/" }
ports = ["http", "metrics:9100"]
alive = "http:/health"
depends_on = ["h"]
restart_with = ["h"]
[[processes]]
name = "tokenizer"
command = ["sh"]
"""
STORES = """
[service]
model = "/models/llama"
[transfer]
lease_s = 12
[[stores]]
name = "kv"
kind = "{store}"
[[engines]]
name = "p"
role = "prefill"
kind = "vllm"
device = "cpu"
connector = "{connector}"
store = "kv"
[[engines]]
name = "d"
role = "decode"
kind = "vllm"
device = "cpu"
connector = "{connector}"
store = "kv"
"""


def plan(text: str, on: Host | None = None, running: Plan | None = None) -> Plan:
    found = on or host()
    return make_plan(load_text(text, "/x/pdctl.toml", found), found, running)


def of(planned: Plan, name: str) -> ProcessSpec:
    return next(spec for spec in planned.processes if spec.name == name)


def test_placeholders_become_ports_and_the_order_follows_what_is_needed() -> None:
    planned = plan(COMMANDS)
    names = [spec.name for spec in planned.processes]
    assert names == ["tokenizer", "h-0", "exporter", "proxy-0", "proxy-1"]
    exporter = of(planned, "exporter")
    http = exporter.ports["http"]
    assert exporter.ports == {"http": http, "metrics": 9100}
    assert exporter.argv == ("sh", "serve", f"--listen={http}", "--metrics=9100")
    assert exporter.env == {"METRICS": "http://127.0.0.1:9100/"}
    assert (exporter.kind, exporter.role, exporter.group) == ("command", "command", "exporter")
    assert (exporter.depends_on, exporter.restart_with) == (("h-0",), ("h-0",))
    assert (exporter.probe.ready, exporter.probe.alive) == (f"tcp:127.0.0.1:{http}", f"http://127.0.0.1:{http}/health")
    assert of(planned, "tokenizer").probe.ready == of(planned, "tokenizer").probe.alive == ""
    assert of(planned, "h-0").depends_on == ("tokenizer",)
    assert of(planned, "proxy-0").depends_on == ("h-0",), "the service does not need the exporter"
    ports = [port for spec in planned.processes for purpose, port in spec.ports.items() if purpose != "http"]
    assert len(set(ports)) == len(ports)


def test_only_engines_and_proxies_are_ours() -> None:
    planned = plan(COMMANDS)
    assert [spec.name for spec in planned.processes if spec.is_engine] == ["h-0"]
    assert [spec.name for spec in planned.processes if spec.is_proxy] == ["proxy-0", "proxy-1"]
    assert [spec.name for spec in planned.processes if not spec.is_ours] == ["tokenizer", "exporter"]


def test_a_process_keeps_its_port_over_an_apply() -> None:
    first = plan(COMMANDS)
    more = COMMANDS.replace('[[processes]]\nname = "exporter"', '[[processes]]\nname = "a"\ncommand = ["sh"]\n'
                            'ports = ["http"]\n[[processes]]\nname = "exporter"')  # fmt: skip
    found = diff(first, plan(more, running=first))
    assert (found.added, dict(found.restarted)) == (("a",), {})


def test_another_order_is_taken_on_without_a_restart() -> None:
    first = plan(COMMANDS)
    found = diff(first, plan(COMMANDS.replace('depends_on = ["tokenizer"]\n', ""), running=first))
    assert found.live == {"pdctl": "probes or order of h-0 changed"}
    assert not found.restarted


def test_engines_do_not_get_the_gpu_of_a_process() -> None:
    text = COMMANDS.replace('role = "hybrid"', 'role = "hybrid"\ndevice = "cuda"').replace(
        'name = "tokenizer"', 'name = "tokenizer"\ngpus = [0]'
    )
    planned = plan(text, host(GPUS))
    assert of(planned, "h-0").gpus == ("GPU-1",)
    tokenizer = of(planned, "tokenizer")
    assert (tokenizer.gpus, tokenizer.device, tokenizer.env["CUDA_VISIBLE_DEVICES"]) == (("GPU-0",), "cuda", "GPU-0")


def test_an_engine_that_is_a_process_is_reached_at_its_port() -> None:
    text = """
[service]
model = "m"
[[processes]]
name = "mine"
command = ["sh"]
ports = ["http"]
[[engines]]
name = "h"
role = "hybrid"
kind = "vllm"
process = "mine"
"""
    planned = plan(text)
    [attached] = planned.attached
    assert (attached.host, attached.port) == ("127.0.0.1", of(planned, "mine").ports["http"])
    assert attached.connector == "nixl"
    assert of(planned, "proxy").depends_on == ("mine",)


# -- stores ------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path) -> Host:
    model = tmp_path / "llama"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return replace(host(), package_in=lambda python, names: (names[-1], "0.32.0"))


def stores(machine: Host, tmp_path: Path, connector: str = "mooncake-store", store: str = "mooncake") -> Plan:
    text = STORES.format(connector=connector, store=store).replace("/models/llama", str(tmp_path / "llama"))
    return plan(text, machine)


def kv_config(spec: ProcessSpec) -> dict[str, object]:
    found: dict[str, object] = json.loads(spec.argv[spec.argv.index("--kv-transfer-config") + 1])
    return found


def test_engines_of_a_mooncake_store_get_its_address_in_a_file(machine: Host, tmp_path: Path) -> None:
    planned = stores(machine, tmp_path)
    store, prefill, decode = (of(planned, name) for name in ("kv", "p-0", "d-0"))
    assert [spec.name for spec in planned.processes] == ["kv", "p-0", "d-0", "proxy"]
    assert (store.kind, store.role) == ("mooncake", "store")
    assert set(store.ports) == {"rpc", "metrics"}
    assert f"--rpc_port={store.ports['rpc']}" in store.argv
    assert store.probe.alive == f"http://127.0.0.1:{store.ports['metrics']}/health"
    assert prefill.depends_on == decode.depends_on == ("kv",)
    [(path, content)] = prefill.files.items()
    assert path == prefill.env["MOONCAKE_CONFIG_PATH"]
    assert path.startswith(planned.run_dir)
    said = json.loads(content)
    assert said["master_server_address"] == f"127.0.0.1:{store.ports['rpc']}"
    assert (said["metadata_server"], said["protocol"]) == ("P2PHANDSHAKE", "tcp")
    assert (said["global_segment_size"], said["local_buffer_size"]) == (4 << 30, 1 << 30)
    assert set(decode.files).isdisjoint(prefill.files)
    assert prefill.env["PYTHONHASHSEED"] == decode.env["PYTHONHASHSEED"] == "0"
    assert kv_config(prefill)["kv_role"] == "kv_producer"
    assert kv_config(prefill)["kv_connector"] == "MooncakeStoreConnector"
    assert kv_config(prefill)["kv_load_failure_policy"] == "recompute"
    assert {spec.connector for spec in (prefill, decode)} == {"mooncake-store"}


def test_keys_in_a_store_name_all_that_decides_the_kv(machine: Host, tmp_path: Path) -> None:
    def prefix(planned: Plan, name: str) -> object:
        extra = kv_config(of(planned, name))["kv_connector_extra_config"]
        assert isinstance(extra, dict)
        return extra["cache_prefix"]

    planned = stores(machine, tmp_path)
    assert prefix(planned, "p-0") == prefix(planned, "d-0")
    for key in ('dtype = "bfloat16"', 'quantization = "fp8"'):
        other = plan(planned.text.replace('kind = "vllm"', f'kind = "vllm"\n{key}'), machine)
        assert prefix(other, "p-0") == prefix(other, "d-0") != prefix(planned, "d-0")


def test_an_http_metadata_service_is_planned_if_wanted(machine: Host, tmp_path: Path) -> None:
    text = stores(machine, tmp_path).text.replace('kind = "mooncake"', 'kind = "mooncake"\nmetadata = "http"')
    planned = plan(text, machine)
    store = of(planned, "kv")
    port = store.ports["metadata"]
    assert f"--http_metadata_server_port={port}" in store.argv
    [content] = of(planned, "p-0").files.values()
    assert json.loads(content)["metadata_server"] == f"http://127.0.0.1:{port}/metadata"


def test_engines_of_lmcache_get_its_address_in_a_file(machine: Host, tmp_path: Path) -> None:
    gpus = replace(host(GPUS), package_in=lambda python, names: (names[0], "0.32.0") if names else None)
    text = STORES.format(connector="lmcache", store="lmcache").replace("/models/llama", str(tmp_path / "llama"))
    planned = plan(text.replace('device = "cpu"', 'device = "cuda"'), gpus)
    store, prefill = of(planned, "kv"), of(planned, "p-0")
    port = store.ports["store"]
    assert store.argv[1:] == ("-m", "lmcache.v1.server", "127.0.0.1", str(port), "cpu")
    assert store.probe.ready == store.probe.alive == f"tcp:127.0.0.1:{port}"
    [content] = prefill.files.values()
    assert json.loads(content)["remote_url"] == f"lm://127.0.0.1:{port}"
    assert list(prefill.files) == [prefill.env["LMCACHE_CONFIG_FILE"]]


def test_a_changed_file_restarts_its_engine(machine: Host, tmp_path: Path) -> None:
    first = stores(machine, tmp_path)
    text = first.text.replace('kind = "mooncake"', 'kind = "mooncake"\nsegment_gb = 2')
    found = diff(first, plan(text, machine, first))
    assert found.restarted == {"p-0": "files: p-0.mooncake.json", "d-0": "files: d-0.mooncake.json"}


@pytest.mark.parametrize(
    ("connector", "store", "line", "key", "message"),
    [
        ("mooncake-store", "", "connector", "connector", "connector 'mooncake-store' needs a store"),
        ("nixl+mooncake-store", "", "connector", "connector", "connector 'nixl+mooncake-store' needs a store"),
        ("nixl", "lmcache", "store", "store", "connector 'nixl' cannot use stores of kind 'lmcache'"),
        ("lmcache", "lmcache", "connector", "connector", "LMCache's connector does not work on CPUs: every engine"),
        ("nixl", "mooncake", "store", "store", "connector 'nixl' cannot use stores of kind 'mooncake'"),
    ],
)
def test_a_connector_and_its_store_must_fit(
    machine: Host, tmp_path: Path, connector: str, store: str, line: str, key: str, message: str
) -> None:
    text = STORES.format(connector=connector, store=store or "mooncake")
    text = text.replace("/models/llama", str(tmp_path / "llama"))
    if not store:
        text = text.replace('store = "kv"\n', "")
    with pytest.raises(ConfigError) as found:
        plan(text, machine)
    first = found.value.problems[0]
    assert first.key == f"engines[0].{key}"
    assert first.message.startswith(message)
    assert first.hint
    assert text.splitlines()[first.line - 1].startswith(line)


def test_a_store_elsewhere_is_named_by_the_engines_environment(machine: Host, tmp_path: Path) -> None:
    text = stores(machine, tmp_path).text.replace('store = "kv"', 'env = { MOONCAKE_CONFIG_PATH = "/etc/mc.json" }')
    prefill = of(plan(text, machine), "p-0")
    assert prefill.env["MOONCAKE_CONFIG_PATH"] == "/etc/mc.json"
    assert (prefill.files, prefill.depends_on) == ({}, ())
