from __future__ import annotations

from dataclasses import replace

from pdctl.host import Host
from pdctl.net.identity import CERTIFICATES_ENV
from pdctl.plan import Plan, Share, make_plan
from pdctl.topology.loader import load_cluster_text
from tests.topology.test_loader import GPUS, host

TEXT = """
[service]
name = "s"
model = "sample:tiny-qwen3"
[cluster]
etcd = ["https://10.0.0.1:2379"]
interface = "10.0.0.0/24"
secret_file = "/etc/pdctl/secret"
certificates = "/etc/pdctl"
[[engines]]
name = "builtin"
role = "hybrid"
[[engines]]
name = "vllm"
role = "hybrid"
kind = "vllm"
[[engines]]
name = "sglang"
role = "hybrid"
kind = "sglang"
"""


def package_in(_: str, names: tuple[str, ...]) -> tuple[str, str] | None:
    return (names[0], "0.30.0") if names else None


HOST: Host = replace(host(GPUS), address="10.0.0.2", package_in=package_in)


def planned(text: str) -> Plan:
    share = Share("a", frozenset({"builtin-0", "vllm-0", "sglang-0"}))
    return make_plan(load_cluster_text(text, "/x/pdctl.toml"), HOST, None, share)


def test_processes_that_can_speak_tls_with_certificates() -> None:
    plan = planned(TEXT)
    assert (plan.certificates, plan.node) == ("/etc/pdctl", "a")
    builtin, vllm, sglang, proxy = plan.processes
    for spec in (builtin, proxy):
        assert spec.tls
        assert spec.env[CERTIFICATES_ENV] == "/etc/pdctl"
    assert builtin.probe.ready == f"https://10.0.0.2:{builtin.ports['http']}/health"
    assert builtin.probe.state.startswith("https://")
    # Clients have no certificates: what is called by its own service has a port of its own.
    assert proxy.argv[-4:] == ("--control-port", str(proxy.ports["control"]), "--control-host", "10.0.0.2")
    assert proxy.probe.alive == f"https://10.0.0.2:{proxy.ports['control']}/pdctl/v1/pool"
    assert plan.proxy_url == "http://10.0.0.2:8000"
    # vLLM reads the files itself; 2 is CERT_REQUIRED of Python's ssl.
    words = " ".join(vllm.argv)
    assert vllm.tls
    assert "--ssl-certfile /etc/pdctl/node.pem --ssl-keyfile /etc/pdctl/node.key" in words
    assert "--ssl-ca-certs /etc/pdctl/ca.pem" in words
    assert "--ssl-cert-reqs 2 --enable-ssl-refresh" in words
    # SGLang cannot ask its clients for certificates.
    assert not sglang.tls
    assert sglang.probe.ready.startswith("http://")
    assert CERTIFICATES_ENV not in sglang.env


def test_without_certificates_nothing_speaks_tls() -> None:
    plan = planned(TEXT.replace('certificates = "/etc/pdctl"\n', ""))
    assert plan.certificates == ""
    assert not any(spec.tls or CERTIFICATES_ENV in spec.env or "https" in spec.probe.ready for spec in plan.processes)
    assert not any("--ssl" in word for spec in plan.processes for word in spec.argv)
    assert "control" not in plan.processes[-1].ports
