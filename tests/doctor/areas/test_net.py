"""Ports and addresses of a topology."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from pdctl.doctor.areas.net import NetFacts, check
from pdctl.host import Host, PortHolder, read_host
from pdctl.topology.loader import load_file

BASE = '[service]\nmodel = "sample:tiny-qwen3"\n[proxy]\nport = 8123\n'
HYBRID = '[[engines]]\nname = "e"\nrole = "hybrid"\n'


@pytest.fixture
def host() -> Host:
    return replace(read_host(), listening={})


def found(
    tmp_path: Path,
    host: Host,
    text: str,
    env: dict[str, str] | None = None,
    is_running: bool = False,
    proc_root: Path | None = None,
) -> dict[str, str]:
    path = tmp_path / "pdctl.toml"
    path.write_text(text)
    proc = proc_root or tmp_path / "proc"
    facts = NetFacts(load_file(path, host), host, env or {}, is_running, proc, connects=lambda *_: "")
    return {finding.id: f"{finding.severity.value} {finding.subject}: {finding.fix}" for finding in check(facts)}


def kernel(tmp_path: Path, ports: str = "32768 60999", reserved: str = "", most: str = "4096") -> Path:
    for name, text in (
        ("ipv4/ip_local_port_range", ports), ("ipv4/ip_local_reserved_ports", reserved), ("core/somaxconn", most),
    ):  # fmt: skip
        path = tmp_path / "kernel/sys/net" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return tmp_path / "kernel"


def test_nothing_wrong(tmp_path: Path, host: Host) -> None:
    assert found(tmp_path, host, BASE + HYBRID, proc_root=kernel(tmp_path)) == {"net.ports": "ok net: "}


def test_a_port_that_is_taken(tmp_path: Path, host: Host) -> None:
    taken = replace(host, listening={8123: PortHolder(41, "nginx")})
    assert found(tmp_path, taken, BASE + HYBRID)["net.ports"].startswith("critical proxy.port 8123: kill 41, or")
    assert "critical" not in found(tmp_path, taken, BASE + HYBRID, is_running=True)["net.ports"], "our own proxy"


def test_ports_of_mooncake_that_are_taken(tmp_path: Path, host: Host) -> None:
    text = BASE + '[transfer]\nbackend = "mooncake"\nports = [16000, 16199]\n' + HYBRID
    one = replace(host, listening={16007: PortHolder(None, "?")})
    assert "net.ports" not in {id_ for id_, said in found(tmp_path, one, text).items() if not said.startswith("ok")}
    most = replace(host, listening=dict.fromkeys(range(16000, 16150), PortHolder(None, "?")))
    assert found(tmp_path, most, text)["net.ports"].startswith("warning transfer.ports")


def test_ports_within_each_other(tmp_path: Path, host: Host) -> None:
    text = BASE.replace("8123", "16100") + '[transfer]\nbackend = "mooncake"\nports = [16000, 16199]\n' + HYBRID
    assert found(tmp_path, host, text)["net.clash"] == "warning proxy.port 16100: port = 16200 under [proxy]"


def test_the_kernels_own_range(tmp_path: Path, host: Host) -> None:
    text = BASE.replace("8123", "40000") + HYBRID
    fired = found(tmp_path, host, text, proc_root=kernel(tmp_path, reserved="5000-5010"))["net.ephemeral"]
    assert fired == "warning port 40000: sysctl net.ipv4.ip_local_reserved_ports=5000-5010,40000"
    assert "net.ephemeral" not in found(tmp_path, host, text, proc_root=kernel(tmp_path, reserved="5000,39000-41000"))


def test_ports_far_apart_are_reserved_each_by_itself(tmp_path: Path, host: Host) -> None:
    text = BASE.replace("8123", "60990") + '[transfer]\nbackend = "mooncake"\nports = [33000, 33199]\n' + HYBRID
    fired = found(tmp_path, host, text, proc_root=kernel(tmp_path))["net.ephemeral"]
    assert fired.endswith("ip_local_reserved_ports=33000-33199,60990")


def test_an_address_that_is_none(tmp_path: Path, host: Host) -> None:
    path = tmp_path / "pdctl.toml"
    path.write_text(BASE + '[[engines]]\nname = "e"\nrole = "hybrid"\nurl = "http://a..b:8100"\n')
    assert "net.attached" in {finding.id for finding in check(NetFacts(load_file(path, host), host))}


def test_a_short_backlog(tmp_path: Path, host: Host) -> None:
    assert "net.backlog" in found(tmp_path, host, BASE + HYBRID, proc_root=kernel(tmp_path, most="128"))


FAR = '[[engines]]\nname = "far"\nrole = "decode"\nurl = "http://10.9.8.7:8100"\n'


def test_loopback_to_far_peers(tmp_path: Path, host: Host) -> None:
    near = '[[engines]]\nname = "p"\nrole = "prefill"\n'
    assert found(tmp_path, host, BASE + near + FAR)["net.loopback"].startswith("critical far: ")
    pair = near + near.replace('"p"', '"d"').replace("prefill", "decode")
    assert found(tmp_path, host, BASE + pair + FAR)["net.loopback"].startswith("warning far: ")
    here = FAR.replace("10.9.8.7", "127.0.0.1")
    assert "net.loopback" not in found(tmp_path, host, BASE + near + here)
    vllm = '[[engines]]\nname = "{0}"\nrole = "{0}"\nkind = "vllm"\nurl = "http://10.9.8.7:{1}"\n'
    others = BASE + near + vllm.format("decode", 1) + vllm.format("prefill", 2)
    assert "net.loopback" not in found(tmp_path, host, others), "of another kind: they pair with each other"
    ours = FAR.replace("10.9.8.7", socket.gethostname())
    assert "net.loopback" not in found(tmp_path, host, BASE + near + ours), "this machine, by its name"
    far = FAR.replace('"far"', '"far-p"').replace("decode", "prefill")
    assert "net.loopback" not in found(tmp_path, host, BASE + far + FAR)


def test_an_attached_engine_that_is_not_there(tmp_path: Path, host: Host) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        text = BASE + f'[[engines]]\nname = "e"\nrole = "hybrid"\nurl = "http://127.0.0.1:{port}"\n'
        path = tmp_path / "pdctl.toml"
        path.write_text(text)
        facts = NetFacts(load_file(path, host), host)
        assert "net.attached" not in {finding.id for finding in check(facts)}
    [gone] = [finding for finding in check(facts) if finding.id == "net.attached"]
    assert "Connection refused" in gone.observed


def test_http_proxies(tmp_path: Path, host: Host) -> None:
    fired = found(tmp_path, host, BASE + FAR + FAR.replace('"far"', '"p"').replace("decode", "prefill"),
                  {"http_proxy": "http://p", "no_proxy": "localhost"})["env.proxy"]  # fmt: skip
    assert fired == "warning http_proxy: export no_proxy=localhost,127.0.0.1,10.9.8.7"
    assert "env.proxy" not in found(tmp_path, host, BASE + HYBRID, {"http_proxy": "p", "no_proxy": "127.0.0.1"})
    assert "env.proxy" not in found(tmp_path, host, BASE + HYBRID, {"http_proxy": "p", "no_proxy": "*"})
