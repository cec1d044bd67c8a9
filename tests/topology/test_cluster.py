"""What a topology says of several machines: each mistake with its line and key, and what works is let through."""

from __future__ import annotations

import pytest

from pdctl.errors import ConfigError
from pdctl.topology.loader import load_cluster_text

TEXT = """
[service]
model = "sample:tiny-qwen3"
[cluster]
etcd = ["https://10.0.0.1:2379", "https://etcd-2.lan:2379/", "https://[fd00::1]:2379"]
interface = "eth0"
secret_file = "secret"
[proxy]
port = 8000
nodes = ["a", "rack-2.node_7"]
[transfer]
backend = "auto"
[[engines]]
name = "prefill"
role = "prefill"
nodes = ["a", "b"]
replicas = 2
[[engines]]
name = "decode"
role = "decode"
"""


def problems(text: str) -> list[tuple[int, str, str]]:
    with pytest.raises(ConfigError) as found:
        load_cluster_text(text, "x.toml")
    return [(problem.line, problem.key, problem.message) for problem in found.value.problems]


def hints(text: str) -> list[str | None]:
    with pytest.raises(ConfigError) as found:
        load_cluster_text(text, "x.toml")
    return [problem.hint for problem in found.value.problems]


def line_of(text: str, start: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if line.startswith(start))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("port = 8000", "port = 8001"),
        ("port = 8000", 'host = "0.0.0.0"'),
        ('port = 8000\nnodes = ["a", "rack-2.node_7"]', 'host = "10.0.0.5"\nnodes = ["a"]'),
        ('nodes = ["a", "b"]\nreplicas = 2', 'nodes = ["a"]\ndevice = "cuda"\ngpus = [0]\n'
         '[[engines]]\nname = "more"\nrole = "prefill"\ndevice = "cuda"\nnodes = ["a"]\nrestart_with = ["prefill"]'),
        ('backend = "auto"', 'backend = "nixl"'),
        ("interface", 'cells = ["rack1-*", "b?"]\ninterface'),
        ('secret_file = "secret"', 'secret_file = "secret"\netcd_user = "u"\netcd_password_file = "f"'),
        ('name = "decode"\nrole = "decode"', 'name = "decode"\nrole = "decode"\nurl = "http://10.0.0.7:8000"'),
    ],
)  # fmt: skip
def test_what_works_is_let_through(old: str, new: str) -> None:
    text = TEXT.replace(old, new).replace('role = "decode"', 'role = "decode"' + '\ndevice = "cuda"' * ("cuda" in new))
    assert load_cluster_text(text, "x.toml").cluster is not None


@pytest.mark.parametrize(
    ("old", "new", "start", "key", "message"),
    [
        ("https://10.0.0.1:2379", "10.0.0.1:2379", "etcd", "cluster.etcd", "'10.0.0.1:2379' is no address of a member"),
        ("https://10.0.0.1:2379", "https://10.0.0.1", "etcd", "cluster.etcd", "'https://10.0.0.1' is no address"),
        ("https://10.0.0.1:2379", "https://10.0.0.1:99999", "etcd", "cluster.etcd", "is no address"),
        ("https://10.0.0.1:2379", "http://10.0.0.1:2379", "etcd", "cluster.etcd", "some members have https"),
        (TEXT.splitlines()[4], "etcd = []", "etcd", "cluster.etcd", "names no member of etcd"),
        ("interface", 'etcd_user = "u"\ninterface', "etcd_user", "cluster.etcd_user", "must be set together"),
        ("interface", 'etcd_password_file = "u"\ninterface', "etcd_pass", "cluster.etcd_password_file", "set together"),
        ("interface", 'cells = ["rack/*"]\ninterface', "cells", "cluster.cells", "'rack/*' is no pattern"),
        ('backend = "auto"', 'backend = "shm"', "backend", "transfer.backend", "shm does not reach other machines"),
        ('nodes = ["a", "b"]', 'nodes = ["a/b"]', "nodes = [\"a/b", "engines[0].nodes", "'a/b' is no name of a node"),
        ("port = 8000", "accept_nodes = true\nnode_keys = \"/etc/hostname\"", "accept_nodes", "proxy.accept_nodes",
         "works on one machine only"),
        ("port = 8000", 'host = "10.0.0.5"', "host", "proxy.host", "10.0.0.5 is the address of one node"),
        ("[transfer]", '[elastic]\nmode = "act"\n[transfer]', "mode =", "elastic.mode", "works on one machine only"),
        ("[transfer]", '[elastic]\nmode = "advise"\n[transfer]', "mode =", "elastic.mode", "works on one machine only"),
        ("[transfer]", '[[stores]]\nname = "s"\nkind = "mooncake"\n[transfer]', "[[stores", "stores[0]",
         "[[stores]] works on one machine only so far: s would have no place"),
        ("[transfer]", '[[processes]]\nname = "p"\ncommand = ["true"]\n[transfer]', "[[proc", "processes[0]",
         "[[processes]] works on one machine only"),
        ("replicas = 2", 'device = "cuda"\ngpus = [0]', "gpus", "engines[0].gpus", "gpus names the GPUs of one node"),
        ('role = "decode"', 'role = "decode"\nkind = "lmdeploy"\ndevice = "cuda"', "kind", "engines[1].kind",
         "on one machine only so far: engines of kind 'lmdeploy' do not protect the KV that other nodes still need"),
        ('nodes = ["a", "b"]\nreplicas = 2', 'url = "http://127.0.0.1:9000"', "url", "engines[0].url",
         "on each node, this is another machine: the node itself"),
        ('nodes = ["a", "b"]\nreplicas = 2', 'url = "http://[::1]:9000"', "url", "engines[0].url", "the node itself"),
        ('role = "decode"', 'role = "decode"\ndepends_on = ["prefill"]', "depends_on", "engines[1].depends_on",
         "depends_on works between engines of one node only"),
        ('nodes = ["a", "b"]', 'nodes = ["a"]\nrestart_with = ["decode"]', "restart", "engines[0].restart_with",
         "restart_with works between engines of one node only"),
    ],
)  # fmt: skip
def test_each_mistake_has_its_line_and_key(old: str, new: str, start: str, key: str, message: str) -> None:
    text = TEXT.replace(old, new)
    assert text != TEXT
    found = [problem for problem in problems(text) if problem[1] == key]
    assert [(line, name) for line, name, _ in found] == [(line_of(text, start), key)]
    assert message in found[0][2]
    assert all(hints(text))


def test_without_cluster_nodes_have_no_effect() -> None:
    lines = TEXT.splitlines()
    text = "\n".join([*lines[:3], *lines[7:]])
    assert [(key, message) for _, key, message in problems(text)] == [
        ("proxy.nodes", "nodes has no effect without [cluster]"),
        ("engines[0].nodes", "nodes has no effect without [cluster]"),
    ]


@pytest.mark.parametrize(
    ("lines", "key", "message"),
    [
        ('launcher = "ssh"', "cluster.launcher", 'launcher = "ssh" needs ssh_nodes'),
        ('ssh_nodes = ["a"]', "cluster.ssh_nodes", "ssh_nodes has no effect with launcher 'none'"),
        (
            'launcher = "ssh"\nssh_nodes = ["a"]\nray_address = "10.0.0.1:6379"', "cluster.ray_address",
            "ray_address has no effect with launcher 'ssh'",
        ),
    ],
)  # fmt: skip
def test_keys_of_another_launcher_have_no_effect(lines: str, key: str, message: str) -> None:
    text = TEXT.replace('secret_file = "secret"', f'secret_file = "secret"\n{lines}')
    assert [found[1:] for found in problems(text)] == [(key, message)]


def test_ssh_with_its_nodes_is_right() -> None:
    text = TEXT.replace('secret_file = "secret"', 'secret_file = "secret"\nlauncher = "ssh"\nssh_nodes = ["a", "b"]')
    cluster = load_cluster_text(text, "x.toml").cluster
    assert cluster is not None
    assert (cluster.launcher, cluster.ssh_nodes) == ("ssh", ("a", "b"))


def test_a_node_is_in_the_first_cell_that_its_name_matches() -> None:
    cluster = load_cluster_text(TEXT.replace("interface", 'cells = ["rack1-*", "rack*"]\ninterface'), "x").cluster
    assert cluster is not None
    assert [cluster.cell_of(name) for name in ("rack1-a", "rack2-a", "a")] == ["rack1-*", "rack*", "-"]
    alone = load_cluster_text(TEXT, "x").cluster
    assert alone is not None
    assert alone.cell_of("rack1-a") == ""
