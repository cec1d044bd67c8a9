"""[[processes]] and [[stores]]: what a topology may say of them, and what is refused, with its line."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from pdctl.host import Host
from pdctl.plan import make_plan
from pdctl.topology.loader import load_text
from pdctl.topology.spec import Topology
from tests.topology.test_loader import GPUS, host, problems

HEAD = """
[service]
model = "sample:tiny-qwen3"
[[engines]]
name = "h"
role = "hybrid"
"""


def process(*lines: str, name: str = "p") -> str:
    return "\n".join([HEAD, "[[processes]]", f'name = "{name}"', *lines, ""])


def with_mooncake(on: Host | None = None) -> Host:
    return replace(on or host(), package_in=lambda python, names: ("".join(names[:1]), "0.3.13"))


def load(text: str, on: Host | None = None) -> Topology:
    return load_text(text, "x.toml", on or host())


def test_a_command_with_its_defaults() -> None:
    [entry] = load(process('command = ["sh", "-c", "x {port}"]', 'ports = ["http", "metrics:9100"]')).processes
    assert entry.ports == (("http", 0), ("metrics", 9100))
    assert (entry.ready, entry.alive) == ("tcp", "tcp"), "a process with a port must accept connections"
    [bare] = load(process('command = ["sh"]')).processes
    assert (bare.ready, bare.alive) == ("none", "none")
    [logs] = load(process('command = ["sh"]', 'ready = "log:up"')).processes
    assert (logs.ready, logs.alive) == ("log:up", "none")


@pytest.mark.parametrize(
    ("lines", "key", "message"),
    [
        (["command = []"], "command", "must be a list of strings"),
        (['command = ["no-such-program-x"]'], "command", "no-such-program-x does not exist"),
        (['command = ["sh", "{port}"]'], "command", "{port} names a port that it does not have"),
        (['command = ["sh", "{port:b}"]', 'ports = ["a"]'], "command", "{port:b} names a port"),
        (['command = ["sh"]', 'env = { A = "{port:b}" }'], "env", "{port:b} names a port"),
        (['command = ["sh"]', 'ports = ["a", "a:9"]'], "ports", "names a port twice"),
        (['command = ["sh"]', 'ports = ["a:70000"]'], "ports", "from 1 to 65535"),
        (['command = ["sh"]', 'ports = ["A b"]'], "ports", "must be a list of purposes"),
        (['command = ["sh"]', 'ports = ["a:8000"]'], "ports", "port 8000 is already used by the proxy"),
        (['command = ["sh"]', 'ready = "tcp"'], "ready", "needs a port"),
        (['command = ["sh"]', 'alive = "http:/x"'], "alive", "needs a port"),
        (['command = ["sh"]', 'alive = "log:x"'], "alive", "must be tcp, http:/PATH or none"),
        (['command = ["sh"]', 'ready = "log:("'], "ready", "not a regular expression"),
        (['command = ["sh"]', 'depends_on = ["x"]'], "depends_on", "'x' is not another group, process or store"),
        (['command = ["sh"]', 'depends_on = ["p"]'], "depends_on", "'p' is not another group, process or store"),
        (['command = ["sh"]', 'restart_with = ["x"]'], "restart_with", "'x' is not another group"),
        (['command = ["sh"]', "cpus = [9]"], "cpus", "CPU 9 does not exist"),
        (['command = ["sh"]', "gpus = [5]"], "gpus", "GPU 5 does not exist"),
        (['command = ["sh"]', 'kind = "command"'], "kind", "unknown key 'kind'"),
    ],
)
def test_what_cannot_work_is_refused_with_its_line(lines: list[str], key: str, message: str) -> None:
    text = process(*lines)
    [(line, path, said)] = problems(text)
    assert path == f"processes[0].{key}"
    assert message in said
    assert text.splitlines()[line - 1].startswith(key)


def test_names_are_used_once() -> None:
    for name in ("h", "h-0", "proxy"):
        assert "is already used by" in problems(process('command = ["sh"]', name=name))[0][2]


def test_entries_that_wait_for_each_other_are_refused() -> None:
    text = process('command = ["sh"]', 'depends_on = ["h"]').replace('"hybrid"', '"hybrid"\ndepends_on = ["p"]', 1)
    [(line, key, message)] = problems(text)
    assert key == "engines[0].depends_on"
    assert message in ("these wait for each other: h needs p needs h", "these wait for each other: p needs h needs p")
    assert text.splitlines()[line - 1].startswith("depends_on")


def test_a_gpu_is_not_given_twice_unless_both_share_it() -> None:
    engine = HEAD + 'gpus = [0]\nshare_gpu = true\n[[processes]]\nname = "p"\ncommand = ["sh"]\ngpus = [0]\n'
    [(_, key, message)] = problems(engine, host(GPUS))
    assert (key, message) == ("processes[0].gpus", "GPU 0 is assigned to both h-0 and p")
    load(engine + "share_gpu = true\n", host(GPUS))


# -- engines that are processes ----------------------------------------------------------------------------


def served(command: str, keys: str = "") -> str:
    return f"""
[service]
model = "m"
[[processes]]
name = "p"
{command}
[[engines]]
name = "h"
role = "hybrid"
kind = "vllm"
{keys}
"""


def test_an_engine_may_be_a_process() -> None:
    topology = load(served('command = ["sh"]\nports = ["http"]', 'process = "p"'))
    assert topology.engines[0].is_attached
    assert topology.engines[0].replica_names() == ("h",)


@pytest.mark.parametrize(
    ("command", "keys", "key", "message"),
    [
        ('command = ["sh"]', 'process = "p"', "process", "process 'p' has no port"),
        ('command = ["sh"]', 'process = "q"', "process", "there is no process 'q'"),
        ('command = ["sh"]', 'process = "p"\nurl = "http://h:1"', "process", "url and process are both set"),
        ('command = ["sh"]', 'process = "p"\nreplicas = 2', "replicas", "no effect on an attached engine"),
        ('command = ["sh"]', 'url = "http://h:1"\nconnector = "x"', "connector", "must be one of: nixl"),
    ],
)
def test_what_an_engine_that_is_a_process_cannot_have(command: str, keys: str, key: str, message: str) -> None:
    [(_, path, said)] = problems(served(command, keys))
    assert path == f"engines[0].{key}"
    assert message in said


# -- stores ------------------------------------------------------------------------------------------------


def store(*lines: str, kind: str = "mooncake") -> str:
    return "\n".join([HEAD, "[[stores]]", 'name = "kv"', f'kind = "{kind}"', *lines, ""])


def test_a_store_with_its_defaults() -> None:
    [found] = load(store(), with_mooncake()).stores
    assert (found.kind, found.metadata, found.segment_gb, found.data_dir) == ("mooncake", "p2p", 4.0, "")


@pytest.mark.parametrize(
    ("lines", "kind", "key", "message"),
    [
        ([], "redis", "kind", "must be one of: lmcache, mooncake"),
        (['data_dir = "/tmp"'], "lmcache", "data_dir", "has no effect on stores of kind 'lmcache'"),
        (["chunk_tokens = 64"], "mooncake", "chunk_tokens", "has no effect on stores of kind 'mooncake'"),
        (['data_dir = "/no/such"'], "mooncake", "data_dir", "/no/such does not exist"),
        (['metadata = "etcd"'], "mooncake", "metadata", "must be one of: p2p, http"),
    ],
)
def test_what_a_store_cannot_have(lines: list[str], kind: str, key: str, message: str) -> None:
    [(_, path, said)] = problems(store(*lines, kind=kind), with_mooncake())
    assert path == f"stores[0].{key}"
    assert message in said


def test_a_store_that_is_not_installed_is_reported() -> None:
    [(line, key, message)] = problems(store())
    assert key == "stores[0].kind"
    assert "has no package mooncake-transfer-engine or" in message
    elsewhere = f'python = "{sys.executable}"'
    [(line, key, message)] = problems(store(elsewhere), replace(host(), package_in=lambda python, names: None))
    assert (key, store(elsewhere).splitlines()[line - 1]) == ("stores[0].python", elsewhere)


def test_only_kinds_that_use_a_store_may_name_one() -> None:
    text = store().replace('"hybrid"', '"hybrid"\nkind = "lmdeploy"\nstore = "kv"', 1)
    found = problems(text, with_mooncake())
    assert ("engines[0].store", "store has no effect on engines of kind 'lmdeploy'") in [entry[1:] for entry in found]


# -- stores of builtin engines -------------------------------------------------------------------------------


def keeping(*lines: str, kind: str = "mooncake") -> str:
    """A builtin engine with these keys, and a store."""
    return store(kind=kind).replace('role = "hybrid"', "\n".join(['role = "hybrid"', *lines]), 1)


def test_a_builtin_engine_uses_a_store_and_host_memory() -> None:
    here = with_mooncake()
    topology = load(keeping('store = "kv"', "kv_offload_gb = 2", "prefix_quota = 0.5"), here)
    spec = next(spec for spec in make_plan(topology, here).processes if spec.name == "h-0")
    words = " ".join(spec.argv)
    assert "--store mooncake" in words
    assert "--kv-offload-gb 2" in words
    assert "--prefix-quota 0.5" in words
    assert "kv" in spec.depends_on
    config = json.loads(spec.files[spec.env["MOONCAKE_CONFIG_PATH"]])
    assert config["global_segment_size"] == 4 << 30


@pytest.mark.parametrize(
    ("lines", "kind", "key", "message"),
    [
        (['store = "kv"'], "lmcache", "store", "cannot use stores of kind 'lmcache'"),
        (['store = "kv"', "prefix_caching = false"], "mooncake", "store", "nothing is kept without a prefix cache"),
        (["kv_offload_gb = 1", "prefix_caching = false"], "mooncake", "kv_offload_gb", "nothing is kept"),
        (["prefix_quota = 0.5", "prefix_caching = false"], "mooncake", "prefix_quota", "nothing is kept"),
        (["prefix_quota = 0"], "mooncake", "prefix_quota", "must be a number greater than 0"),
        (["kv_offload_gb = -1"], "mooncake", "kv_offload_gb", "must be a number, at least 0"),
        (["kv_offload_gb = 1e4"], "mooncake", "kv_offload_gb", "needs 10001 GiB in total"),
    ],
)
def test_what_a_builtin_engine_cannot_keep(lines: list[str], kind: str, key: str, message: str) -> None:
    found = problems(keeping(*lines, kind=kind), with_mooncake())
    assert [(path, message in said) for _, path, said in found] == [(f"engines[0].{key}", True)], found
