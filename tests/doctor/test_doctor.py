"""The command, and the areas that are not RDMA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pdctl.doctor import Finding, Severity, exit_code
from pdctl.doctor.host import HostScene, check
from pdctl.doctor.report import summary, text
from pdctl.doctor.runtime import RuntimeScene
from pdctl.doctor.runtime import check as check_runtime
from tests.doctor.trees import TREES


def doctor(cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # Libraries that other tests load set such variables for their process.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MC_", "NCCL_", "UCX_"))}
    argv = [sys.executable, "-m", "pdctl", "doctor", *words]
    return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=60, env=env)


def test_on_a_machine_without_rdma_it_is_calm(tmp_path: Path) -> None:
    TREES["no class"](tmp_path / "sys")
    done = doctor(tmp_path, "--sysfs-root", str(tmp_path / "sys"))
    assert done.returncode == 0, done.stdout
    assert "none is needed on one machine" in done.stdout
    assert "critical" not in done.stdout + done.stderr


def test_json_has_every_field(tmp_path: Path) -> None:
    TREES["dual port"](tmp_path / "sys")
    done = doctor(tmp_path, "rdma", "--json", "--sysfs-root", str(tmp_path / "sys"))
    found = json.loads(done.stdout)
    assert found["schema"] == 1
    assert done.returncode == 2, "no character device"
    for finding in found["findings"]:
        assert set(finding) == {
            "id",
            "severity",
            "subject",
            "observed",
            "expected",
            "evidence",
            "cause",
            "fix",
            "reference",
        }


def test_ibstatus_by_the_command(tmp_path: Path) -> None:
    TREES["two devices"](tmp_path / "sys")
    done = doctor(tmp_path, "rdma", "--ibstatus", "--port", "mlx5_1:1", "--sysfs-root", str(tmp_path / "sys"))
    assert done.returncode == 0
    assert done.stdout.startswith("Infiniband device 'mlx5_1' port 1 status:\n\tdefault gid:\t fe80:")
    assert doctor(tmp_path, "rdma", "--ibstatus", "--sysfs-root", str(tmp_path)).returncode == 255


def test_faults_of_a_topology_are_found_with_their_fix(tmp_path: Path) -> None:
    (tmp_path / "pdctl.toml").write_text(
        '[service]\nmodel = "sample:tiny-qwen3"\n[transfer]\nbackend = "mooncake"\nprotocol = "rdma"\n'
        'devices = ["mlx5_9"]\n[[engines]]\nname = "e"\nrole = "hybrid"\nkv_cache_gb = 0.1\n'
    )
    TREES["no class"](tmp_path / "sys")
    done = doctor(
        tmp_path, "rdma", "topology", "--against", "pdctl.toml", "--json", "--sysfs-root", str(tmp_path / "sys")
    )
    found = {finding["id"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert found["port.gone"]["subject"] == "mlx5_9"
    assert found["rdma.none"]["severity"] == "critical"
    assert done.returncode == 2
    (tmp_path / "pdctl.toml").write_text(
        '[service]\nmodel = "sample:nothing"\n[[engines]]\nname = "e"\nrole = "hybrid"\n'
    )
    done = doctor(tmp_path, "topology")
    assert done.returncode == 2
    assert "unknown sample model" in done.stdout


def test_environment_that_contradicts(tmp_path: Path) -> None:
    scene = RuntimeScene(
        {"MC_FORCE_TCP": "1", "UCX_TLS": "tcp", "http_proxy": "http://p", "NCCL_IB_DISABLE": "0"},
        rdma=True,
        hosts=("127.0.0.1",),
        version=lambda name: "1",
        library=lambda name: False,
    )
    found = {(f.id, f.severity.value) for f in check_runtime(scene) if f.severity is not Severity.OK}
    assert found == {
        ("env.switch", "critical"),
        ("env.ucx_tls", "critical"),
        ("env.proxy", "warning"),
        ("runtime.libibverbs", "critical"),
    }
    calm = RuntimeScene(
        {"UCX_TLS": "rc,cuda", "http_proxy": "p", "no_proxy": "127.0.0.1"},
        rdma=True,
        hosts=("127.0.0.1",),
        version=lambda name: "1",
        library=lambda name: True,
    )
    assert {f.severity for f in check_runtime(calm)} == {Severity.OK}


def test_packages_that_are_missing(tmp_path: Path) -> None:
    found = check_runtime(RuntimeScene({}, version=lambda name: None))
    assert {f.subject: f.severity for f in found} == {
        "torch": Severity.WARNING,
        "tokenizers": Severity.WARNING,
        "mooncake-transfer-engine": Severity.INFO,
        "nixl": Severity.INFO,
    }


def test_limits_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/status").write_text("CapEff:\t0000000000000000\n")
    (tmp_path / "meminfo").write_text("MemTotal: 1000 kB\nMemAvailable: 500 kB\n")
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 1024))
    scene = HostScene(tmp_path, tmp_path / "nowhere", pinned_bytes=1 << 30, shared_bytes=1 << 30)
    found = {f.id: f.severity.value for f in check(scene)}
    assert found["limit.files"] == "warning"
    assert found["limit.memlock"] == "critical"
    assert found["shm.size"] == "unknown"
    assert found["memory.free"] == "warning"
    (tmp_path / "self/status").write_text("CapEff:\t0000000000004000\n")
    assert {f.id: f.severity.value for f in check(scene)}["limit.memlock"] == "ok", "CAP_IPC_LOCK: it does not count"


def test_the_report_is_by_subject_worst_first() -> None:
    found = [
        Finding("a", Severity.OK, "good", "fine"),
        Finding("b", Severity.WARNING, "soso", "meh", "better", cause="x", fix="do"),
        Finding("c", Severity.CRITICAL, "bad", "broken"),
        Finding("d", Severity.OK, "bad", "but this works"),
    ]
    lines = text(found).splitlines()
    assert [line.split()[0] for line in lines] == ["critical", "ok", "warning", "why:", "fix:", "ok"]
    assert summary(found) == "1 critical, 1 warning, 2 ok"
    assert exit_code(found) == 2
    assert exit_code([Finding("a", Severity.UNKNOWN, "x", "y")]) == 3
