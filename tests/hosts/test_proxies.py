"""Proxies of several nodes as one: limits of API keys and bodies in quarantine hold at all of them. And the doctor,
asked on one node for all."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest

from tests.hosts.cluster import PROXY_PORT, SECRET, Cluster, topology
from tests.hosts.cluster import cluster as running_cluster
from tests.hosts.lab import reason_to_skip
from tests.registry import etcd
from tests.service import wait_until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip()),
    pytest.mark.skipif(etcd.BINARY is None, reason="etcd is not installed"),
]

ENGINE = """
[[engines]]
name = "hybrid"
role = "hybrid"
kv_cache_gb = 0.05
"""
LIMIT = 30
KEYS = f"""
[[keys]]
name = "team"
requests_per_minute = {LIMIT}
"""
KEY = "the key of a team"


@pytest.fixture(scope="module")
def service() -> Iterator[Cluster]:
    """Two nodes with a proxy each; one of them has the engine."""
    with running_cluster("a", "b") as found:
        for node in found.nodes.values():
            node.write(f"team {hashlib.sha256(KEY.encode()).hexdigest()}\n", "keys.txt")
        text = topology(found.lab, ("a", "b"), ENGINE + KEYS)
        text = text.replace("[proxy]", f'[proxy]\napi_keys = "{found.nodes["a"].folder}/keys.txt"')
        file = found.nodes["a"].write(text, "service.toml")
        found.nodes["a"].cli("up", "-f", str(file), check=True)
        found.until_ready(1)
        yield found


def ask(service: Cluster, node: str, prompt: str = "a b") -> httpx.Response:
    return service.lab.ask(_ask, service.lab[node].address, prompt)


def _ask(address: str, prompt: str) -> httpx.Response:
    with httpx.Client(trust_env=False, timeout=120) as http:
        headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
        return http.post(f"http://{address}:{PROXY_PORT}/v1/completions", content=body(prompt), headers=headers)


def body(prompt: str) -> bytes:
    return json.dumps({"prompt": prompt, "max_tokens": 1}).encode()


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def left(service: Cluster, node: str) -> int | None:
    """What the key has left at a node, without using any of it."""
    with suppress(httpx.TransportError):
        keys = service.get(service.lab[node].address, PROXY_PORT, "/pdctl/v1/keys").json()["keys"]
        found = keys.get("team", {}).get("requests_left")
        return None if found is None else int(found)
    return None


def test_a_limit_holds_at_both_proxies_and_over_the_restart_of_one(service: Cluster) -> None:
    assert ask(service, "b").status_code == 200
    taken = 0
    while (answer := ask(service, "a")).status_code == 200:
        taken += 1
        assert taken < 3 * LIMIT
    assert answer.status_code == 429
    assert taken >= LIMIT - 1 - 2, "what was used at b may be known already"
    wait_until(lambda: left(service, "b") in range(LIMIT // 3), 20, "b to know what was used at a")
    service.kill("b", "proxy")
    # It refills meanwhile, by one in two seconds.
    wait_until(lambda: left(service, "b") in range(LIMIT - 8), 15, "the proxy of b to begin where it was")


def test_a_body_in_quarantine_is_refused_at_both_proxies(service: Cluster) -> None:
    prompt = "this one kills engines"
    digest = hashlib.blake2b(body(prompt), digest_size=16, key=SECRET.encode()).hexdigest()
    wait_until(lambda: ask(service, "a", prompt).status_code == 200, 60, "the key to have something left")
    key, value = encoded(f"{service.keys.quarantine}{digest}"), encoded('{"node":"c","left_s":600}')
    service.lab.ask(etcd.post, service.etcd[0].url, "/v3/kv/put", {"key": key, "value": value})
    for node in ("a", "b"):
        wait_until(lambda node=node: ask(service, node, prompt).status_code == 422, 20, f"{node} to refuse it")
        assert ask(service, node, prompt + "!").status_code != 422
    service.lab.ask(etcd.post, service.etcd[0].url, "/v3/kv/deleterange", {"key": key})
    wait_until(lambda: ask(service, "b", prompt).status_code in (200, 429), 20, "b to take it again")


def test_the_doctor_examines_all_nodes_and_compares_them(service: Cluster) -> None:
    done = service.nodes["b"].cli(
        "doctor", "--all-nodes", "--json", "--against", str(service.nodes["a"].folder / "service.toml")
    )
    found = json.loads(done.stdout)
    assert set(found["nodes"]) == {"a", "b"}
    for findings in found["nodes"].values():
        by_id = {finding["id"]: finding for finding in findings}
        assert by_id["cluster.etcd"]["severity"] == "ok"
        assert "cluster.listen" not in by_id or by_id["cluster.listen"]["severity"] == "ok"
        assert "cluster.secret" not in by_id
        assert by_id["cluster.certificates"]["severity"] == "warning"
    assert [one["id"] for one in found["differences"]] == ["nodes.same"]
    assert done.returncode == 1, "there are no certificates"


def test_transfers_are_measured_between_nodes(service: Cluster) -> None:
    words = ("doctor", "transfer", "--between", "a", "b", "--transport", "mooncake", "--mib", "4", "--json")
    done = service.nodes["b"].cli(*words, "--against", str(service.nodes["b"].folder / "pdctl.toml"))
    (found,) = json.loads(done.stdout)["transfer"]
    assert (found["pair"], found["protocol"], found["bytes_right"]) == ("a to b", "tcp", True), done.stderr
    assert done.returncode == 0
