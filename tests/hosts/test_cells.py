"""Two cells of one node each: each proxy has the engines of its own cell, and all nodes are one cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosts.cluster import PROXY_PORT, Cluster, topology
from tests.hosts.lab import lab, reason_to_skip
from tests.hosts.members import members
from tests.registry import etcd
from tests.service import wait_until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip()),
    pytest.mark.skipif(etcd.BINARY is None, reason="etcd is not installed"),
]
_ENGINES = """
[[engines]]
name = "prefill"
role = "prefill"
replicas = 2
kv_cache_gb = 0.05
[[engines]]
name = "decode"
role = "decode"
replicas = 2
kv_cache_gb = 0.05
inline_prefill = false
"""


def test_engines_and_proxies_keep_to_their_cell(tiny_model: Path) -> None:
    with lab("a", "b") as hosts, members(hosts, "a") as found:
        service = Cluster(hosts, found, ("a", "b"))
        text = topology(hosts, ("a",), _ENGINES).replace("secret_file", 'cells = ["a*", "b*"]\nsecret_file')
        service.configure(text)
        for name in ("a", "b"):
            service.start_agent(name)
        node = service.nodes["a"]
        node.cli("up", "-f", str(node.folder / "pdctl.toml"), check=True)
        wait_until(lambda: len(service.engines()) == 4, 120, "four engines to be ready")
        homes = {entry.name: entry.node for entry in service.engines().values()}
        assert sorted(homes.values()) == ["a", "a", "b", "b"]
        proxies = [entry for entry in service.entries().values() if not entry.is_engine]
        wait_until(lambda: [service.healthy(proxy) for proxy in proxies] == [2, 2], 60, "each proxy to use two engines")
        for proxy in proxies:
            pool = service.get(proxy.host, PROXY_PORT, "/pdctl/v1/pool").json()["engines"]
            assert {homes[name] for name in pool} == {proxy.node}
            roles = {name.split("-")[0] for name in pool}
            assert roles == {"prefill", "decode"}
        listed = {process.name.rpartition("/")[2] for process in service.status("a").processes}
        assert homes.keys() <= listed, "status shows the engines of all cells"
