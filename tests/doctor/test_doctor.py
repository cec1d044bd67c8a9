"""The command, and the areas other than RDMA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pdctl.doctor import Finding, Severity, exit_code
from pdctl.doctor.areas.environment import EnvironmentFacts
from pdctl.doctor.areas.environment import check as check_environment
from pdctl.doctor.areas.host import HostFacts, check
from pdctl.doctor.areas.runtime import RuntimeFacts
from pdctl.doctor.areas.runtime import check as check_runtime
from pdctl.doctor.report import summary, text
from tests.doctor.trees import TREES


def doctor(cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # Libraries loaded by other tests set such variables in this process.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MC_", "NCCL_", "UCX_"))}
    argv = [sys.executable, "-m", "pdctl", "doctor", *words]
    return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=300, env=env)


def test_on_a_machine_without_rdma_it_is_calm(tmp_path: Path) -> None:
    TREES["no class"](tmp_path / "sys")
    done = doctor(tmp_path, "--sysfs-root", str(tmp_path / "sys"))
    assert done.returncode == 0, done.stdout
    assert "not needed on one machine" in done.stdout
    assert "critical" not in done.stdout + done.stderr


def test_json_has_every_field(tmp_path: Path) -> None:
    TREES["dual port"](tmp_path / "sys")
    done = doctor(tmp_path, "rdma", "--json", "--sysfs-root", str(tmp_path / "sys"))
    found = json.loads(done.stdout)
    assert found["schema"] == 1
    assert done.returncode == 1, "one port is down; whether another machine's nodes open is not asked"
    assert "port.chardev" not in done.stdout
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


def test_environment_that_contradicts() -> None:
    env = {"MC_FORCE_TCP": "1", "UCX_TLS": "tcp", "NCCL_IB_DISABLE": "0", "UCX_NET_DEVICES": "mlx5_7:1"}
    found = check_environment(EnvironmentFacts(env, rdma=True, devices={"mlx5_0": True}))
    assert {(f.id, f.severity.value) for f in found} == {
        ("env.switch", "critical"),
        ("env.ucx_tls", "critical"),
        ("env.devices", "critical"),
    }
    assert next(f.fix for f in found if f.id == "env.devices") == "export UCX_NET_DEVICES=mlx5_0:1"
    calm = {"UCX_TLS": "rc,cuda", "NCCL_IB_HCA": "mlx5", "UCX_NET_DEVICES": "all", "MC_MS_FILTERS": "mlx5_0"}
    assert not check_environment(EnvironmentFacts(calm, rdma=True, devices={"mlx5_0": True, "mlx5_1": False}))


@pytest.mark.parametrize(
    ("name", "value", "fires"),
    [
        ("NCCL_IB_HCA", "=mlx5", True),
        ("NCCL_IB_HCA", "^mlx5_9", False),
        ("NCCL_IB_HCA", "=mlx5_0:1,mlx5_0:2", False),
        ("MC_MS_FILTERS", "mlx5_1", True),
        ("NVSHMEM_HCA_LIST", "mlx5_0:1,gone_0:1", True),
    ],
)
def test_devices_named_in_the_environment(name: str, value: str, fires: bool) -> None:
    found = check_environment(EnvironmentFacts({name: value}, devices={"mlx5_0": True, "mlx5_1": False}))
    assert [f.id for f in found] == ["env.devices"] * fires


def test_what_is_installed() -> None:
    def facts(versions: dict[str, str], cuda: bool = False) -> RuntimeFacts:
        return RuntimeFacts({}, cuda=cuda, version=versions.get, library=lambda _: True, folder=lambda _: None,
                            exactly=versions.__contains__)  # fmt: skip

    good = {"torch": "2.13.0", "tokenizers": "1", "transformers": "5.24.0", "mooncake-transfer-engine": "0.3.13",
            "nixl": "1", "nvidia-nccl-cu12": "2.30.4"}  # fmt: skip
    assert {f.severity for f in check_runtime(facts(good, cuda=True))} == {Severity.OK}
    assert "nccl.install" in {f.id for f in check_runtime(facts(good))}
    for versions, cuda, subject in (
        ({"torch": "2.13.0+cpu"}, True, "torch"),
        ({"transformers": "4.57.1"}, False, "transformers"),
        ({"mooncake-transfer-engine": "1", "mooncake-transfer-engine-non-cuda": "1"}, False, "mooncake"),
        ({"mooncake-transfer-engine": "", "mooncake-transfer-engine-non-cuda": "1"}, True, "mooncake"),
    ):
        bad = {name: value for name, value in {**good, **versions}.items() if value}
        found = [f for f in check_runtime(facts(bad, cuda)) if f.id == "runtime.versions"]
        assert [f.subject for f in found] == [subject]
        assert found[0].fix.startswith("pip ")


def test_the_library_that_mooncake_needs() -> None:
    facts = RuntimeFacts({}, rdma=True, version=lambda _: "1", library=lambda _: False)
    found = {f.id: f for f in check_runtime(facts)}
    assert found["runtime.libibverbs"].severity is Severity.CRITICAL
    assert "apt-get install libibverbs1" in found["runtime.libibverbs"].fix


def test_nvshmem_that_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    facts = RuntimeFacts({"NVSHMEM_DIR": str(tmp_path)}, version=lambda _: "3.3.9")
    assert {f.id: f.severity for f in check_runtime(facts)}["nvshmem.install"] is Severity.WARNING
    (tmp_path / "driver/nvidia").mkdir(parents=True)
    params = tmp_path / "driver/nvidia/params"
    for text_, fires in (
        ('EnableStreamMemOPs: 0\nRegistryDwords: ""\n', True),
        ('EnableStreamMemOPs: 1\nRegistryDwords: "PeerMappingOverride=1;"\n', False),
    ):
        params.write_text(text_)
        env = {"NVSHMEM_DIR": str(tmp_path)}
        planted_ = RuntimeFacts(env, version=lambda _: "3.3.9", proc_root=tmp_path, sysfs_root=tmp_path)
        assert ("nvshmem.ibgda" in {f.id for f in check_runtime(planted_)}) == fires
    for name in ("libnvshmem_host.so.3", "nvshmem_bootstrap_uid.so.3"):
        (tmp_path / "lib" / name).touch()
    assert {f.id: f.severity for f in check_runtime(facts)}["nvshmem.install"] is Severity.OK


def test_packages_that_are_missing(tmp_path: Path) -> None:
    found = check_runtime(RuntimeFacts({}, version=lambda name: None, folder=lambda name: None))
    assert {f.id for f in found} == {"runtime.package"}
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
    facts = HostFacts(tmp_path, shm=tmp_path / "nowhere", pinned_bytes=1 << 30, shared_bytes=1 << 30)
    found = {f.id: f.severity.value for f in check(facts)}
    assert found["limit.files"] == "warning"
    assert found["limit.memlock"] == "critical"
    assert found["shm.size"] == "unknown"
    assert found["memory.free"] == "warning"
    (tmp_path / "self/status").write_text("CapEff:\t0000000000004000\n")
    assert {f.id: f.severity.value for f in check(facts)}["limit.memlock"] == "ok", "CAP_IPC_LOCK: it does not count"


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


def planted(tmp_path: Path, **files: str) -> Path:
    """A fake /proc with these files; `__` stands for a slash."""
    for name, text_ in {"meminfo": "MemTotal: 9 kB\nMemAvailable: 9 kB\n", **files}.items():
        path = tmp_path / "proc" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text_)
    return tmp_path / "proc"


def test_the_rest_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc = planted(
        tmp_path, sys__vm__max_map_count="65530", sys__kernel__numa_balancing="1", self__status="CapEff:\t0\n",
        meminfo="MemTotal: 9 kB\nMemAvailable: 9 kB\nHugePages_Free: 0\n",
    )  # fmt: skip
    for node in ("node0", "node1"):
        (tmp_path / "sys/devices/system/node" / node).mkdir(parents=True)
    (tmp_path / ".dockerenv").touch()
    most = 1 << 60  # more than any limit that is one
    monkeypatch.setattr("resource.getrlimit", lambda _: (65536, 65536))
    facts = HostFacts(proc, tmp_path / "sys", tmp_path, {"MC_STORE_USE_HUGEPAGE": "1"}, tmp_path, pinned_bytes=most)
    found = {f.id: f for f in check(facts)}
    assert found["host.hugepages"].severity is Severity.CRITICAL
    assert found["host.map_count"].severity is Severity.INFO
    assert found["host.numa_balancing"].severity is Severity.INFO
    assert found["host.container"].expected == "--cap-add=IPC_LOCK --device=/dev/infiniband"
    (tmp_path / "dev/infiniband").mkdir(parents=True)
    calm = planted(tmp_path, sys__vm__max_map_count="16777216", sys__kernel__numa_balancing="0",
                   self__status="CapEff:\t0000000000004000\n")  # fmt: skip
    facts = HostFacts(calm, tmp_path / "sys", tmp_path, {}, tmp_path, pinned_bytes=4096)
    quiet = {f.id: f.severity for f in check(facts)}
    assert quiet["host.container"] is Severity.OK
    assert not {"host.hugepages", "host.map_count", "host.numa_balancing"} & set(quiet)
    facts = HostFacts(calm, tmp_path / "sys", tmp_path / "elsewhere", {}, tmp_path)
    assert "host.container" not in {f.id for f in check(facts)}


def test_what_runs_has_its_own_limit(tmp_path: Path) -> None:
    limits = "Limit      Soft Limit  Hard Limit  Units\nMax locked memory  65536  {}  bytes\n"
    proc = planted(
        tmp_path, **{"41__limits": limits.format(1 << 20), "41__status": "CapEff:\t0\n", "42__status": "CapEff:\t0\n",
                     "42__limits": limits.format("unlimited"), "43__limits": limits.format(1 << 20),
                     "43__status": "CapEff:\t0000000000004000\n"},
    )  # fmt: skip
    facts = HostFacts(proc, tmp_path / "sys", tmp_path, {}, tmp_path, pinned_bytes=1 << 30, children=(41, 42, 43, 44))
    found = {f.id: f for f in check(facts)}["limit.memlock"]
    assert (found.subject, found.severity, found.observed) == ("pid 41", Severity.CRITICAL, "locked memory: 1 MiB")
    facts = HostFacts(proc, tmp_path / "sys", tmp_path, {}, tmp_path, pinned_bytes=1 << 30, children=(42, 43, 44))
    assert {f.id: f for f in check(facts)}["limit.memlock"].severity is Severity.OK


def test_processes_that_are_stuck(tmp_path: Path) -> None:
    proc = planted(tmp_path, **{"41__stat": "41 (a) b) D 1 41", "42__stat": "42 (c) S 1 42", "43__stat": "43 (d) R 1"})
    facts = HostFacts(proc, tmp_path / "sys", tmp_path, {}, tmp_path, children=(41, 42, 43, 44))
    assert [(f.subject, f.severity) for f in check(facts) if f.id == "host.stuck"] == [("pid 41", Severity.CRITICAL)]


def test_a_limit_of_the_control_group(tmp_path: Path) -> None:
    proc = planted(tmp_path, self__cgroup="0::/\n", meminfo="MemTotal: 99999999 kB\nMemAvailable: 99999999 kB\n")
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for name, text_ in (("max", str(1 << 30)), ("current", "0"), ("stat", "inactive_file 0\n")):
        (group / f"memory.{name}").write_text(text_)
    facts = HostFacts(proc, tmp_path / "sys", tmp_path, {}, tmp_path, shared_bytes=2 << 30)
    found = {f.id: f for f in check(facts)}["memory.free"]
    assert found.severity is Severity.WARNING
    assert found.observed == "1.0 GiB left within this cgroup's limit"


@pytest.mark.parametrize(
    ("words", "says", "hint"),
    [
        (["--ibstatus", "--json"], "--json does nothing with --ibstatus", "--list"),
        (["--list", "--bundle", "x.tar.gz"], "--bundle does nothing with --list", "leave it out"),
        (["rdma", "--port", "mlx5_0"], "--port does nothing here", "with --ibstatus or with --devinfo"),
        (["host", "--mib", "8"], "--mib does nothing here", "with the area transfer"),
        (["--count", "3"], "--count does nothing here", "with --watch"),
        (["net", "--kmsg", "x"], "--kmsg does nothing here", "leave it out"),
        (["--watch", "--matrix"], "--matrix and --watch cannot be combined", "one of them"),
        (["host", "--watch"], "--watch does not check host", "pdctl doctor --watch"),
        (["transfer", "--bundle", "x.tar.gz"], "--bundle does nothing here", "leave it out"),
    ],
)
def test_options_that_would_do_nothing_are_refused(tmp_path: Path, words: list[str], says: str, hint: str) -> None:
    done = doctor(tmp_path, *words)
    assert done.returncode == 1
    assert says in done.stderr
    assert hint in done.stderr
    assert not done.stdout


def test_a_bundle_that_cannot_be_written(tmp_path: Path) -> None:
    done = doctor(tmp_path, "net", "--bundle", str(tmp_path / "no/such/folder/b.tar.gz"))
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
