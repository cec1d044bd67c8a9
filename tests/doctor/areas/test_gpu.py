"""GPU checks with the real pynvml over a stub driver library, and the command end to end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from pdctl.doctor import Severity
from pdctl.doctor.areas.affinity import AffinityFacts, check, matrix, pairing
from pdctl.doctor.areas.gpu import GpuFacts
from pdctl.doctor.areas.gpu import check as check_gpus
from pdctl.doctor.inspection import our_processes
from pdctl.host.devices.gpu import Gpu
from pdctl.host.devices.gpu_health import GpuHealth, GpuReport
from pdctl.host.devices.pci import read_layout
from pdctl.plan import Plan
from tests.doctor.trees import Port, Tree

STUB = Path(__file__).parents[2] / "fakes" / "nvml_stub.c"
TOPOLOGY = """
[service]
model = "sample:tiny-qwen3"
[[engines]]
name = "e"
role = "hybrid"
device = "cuda"
gpus = [0]
kv_cache_gb = 1.0
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nvml")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "libnvidia-ml.so.1", STUB], check=True)
    return folder


def doctor(library: Path, cwd: Path, topology: str = "", health: str = "", **env: str) -> dict[str, dict[str, Any]]:
    """Findings by id; the worst of each."""
    (cwd / "health").write_text(health)
    words = ["gpu", "topology", "--json"]
    if topology:
        (cwd / "t.toml").write_text(topology)
        words += ["--against", "t.toml"]
    stub = {"LD_LIBRARY_PATH": str(library), "PDCTL_STUB_GPUS": "2", "PDCTL_STUB_HEALTH": str(cwd / "health")}
    done = subprocess.run(
        [sys.executable, "-m", "pdctl", "doctor", *words],
        env={**os.environ, **stub, **env}, cwd=cwd, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    found = json.loads(done.stdout)["findings"]
    return {finding["id"]: finding for finding in reversed(found)}


def test_a_healthy_gpu(library: Path, tmp_path: Path) -> None:
    health = "0 ecc 0\n0 rows 1\n0 throttle 1\n0 mode 0\n0 mig 0\n0 persistence 1\n0 lanes 16\n0 links 18\n"
    found = doctor(library, tmp_path, TOPOLOGY, health)
    assert set(found) == {"gpu.present", "topology.valid"}
    assert found["gpu.present"]["observed"] == "Stub H200, 141 GiB, GPU-stub-0"


FIRES = {
    "gpu.ecc": ("0 ecc 3\n", "critical"),
    "gpu.rows": ("0 rows 2\n0 rows_failed 1\n", "critical"),
    "gpu.throttle": ("0 throttle 64\n", "warning"),
    "gpu.nvlink": ("0 links 18\n0 links_down 5\n", "critical"),
    "gpu.lanes": ("0 lanes 8\n", "warning"),
    "gpu.mig": ("0 mig 1\n", "critical"),
    "gpu.mode": ("0 mode 2\n", "critical"),
    "gpu.persistence": ("0 persistence 0\n", "info"),
}


@pytest.mark.parametrize("id_", FIRES)
def test_fires(library: Path, tmp_path: Path, id_: str) -> None:
    health, severity = FIRES[id_]
    found = doctor(library, tmp_path, TOPOLOGY, health)
    assert found[id_]["severity"] == severity
    assert found[id_]["subject"] == "GPU 0"
    assert found[id_]["fix"]


def test_a_gpu_that_the_topology_leaves_alone_is_not_judged(library: Path, tmp_path: Path) -> None:
    found = doctor(library, tmp_path, TOPOLOGY, "1 ecc 3\n1 mig 1\n1 throttle 8\n")
    assert set(found) == {"gpu.present", "topology.valid"}


@pytest.mark.parametrize(
    ("env", "why"),
    [
        ({"PDCTL_STUB_INIT": "9"}, "the NVIDIA kernel driver is not loaded"),
        ({"LD_LIBRARY_PATH": "/nowhere"}, "the NVIDIA driver library is not installed"),
        ({"PDCTL_STUB_GPUS": "0"}, "the driver lists no GPU"),
    ],
)
def test_no_gpu_is_no_fault_until_asked_for(library: Path, tmp_path: Path, env: dict[str, str], why: str) -> None:
    calm = doctor(library, tmp_path, **env)["gpu.none"]
    assert (calm["severity"], calm["observed"]) == ("info", why)
    wanted = doctor(library, tmp_path, TOPOLOGY, **env)
    assert wanted["gpu.none"]["severity"] == "critical"
    assert wanted["topology.invalid"]["severity"] == "critical"


def test_a_driver_of_two_versions(library: Path, tmp_path: Path) -> None:
    assert doctor(library, tmp_path, PDCTL_STUB_INIT="18")["gpu.driver"]["severity"] == "critical"


def test_memory_that_somebody_holds(library: Path, tmp_path: Path) -> None:
    use = tmp_path / "use"
    with subprocess.Popen(["sleep", "60"]) as stranger:
        use.write_text(f"0 {stranger.pid} {140 << 30}\n")
        roomy = doctor(library, tmp_path, TOPOLOGY.replace("= 1.0", "= 0.5"), PDCTL_STUB_USE=str(use))["gpu.mem_held"]
        assert roomy["severity"] == "warning", "there is room beside it"
        use.write_text(f"0 {stranger.pid} {int(140.5 * 2**30)}\n")
        found = doctor(library, tmp_path, TOPOLOGY, PDCTL_STUB_USE=str(use))["gpu.mem_held"]
        stranger.kill()
    assert found["severity"] == "critical"
    assert f"pid {stranger.pid} (sleep)" in found["observed"]
    assert found["fix"] == f"stop it: kill {stranger.pid}"
    use.write_text(f"0 {4_000_000} {20 << 30}\n")
    found = doctor(library, tmp_path, TOPOLOGY, PDCTL_STUB_USE=str(use))["gpu.mem_held"]
    assert "not visible from here" in found["observed"]
    use.write_text(f"0 {stranger.pid} {100 << 20}\n")
    assert "gpu.mem_held" not in doctor(library, tmp_path, TOPOLOGY, PDCTL_STUB_USE=str(use))


def test_memory_that_our_own_engines_hold_is_theirs() -> None:
    gpu = GpuHealth(Gpu(0, "GPU-x", "x", 80 << 30), used=40 << 30, users={41: 40 << 30})
    facts = GpuFacts(GpuReport((gpu,)), is_wanted=True, wanted={0: 50 << 30})
    assert "gpu.mem_held" in {f.id for f in check_gpus(facts)}
    assert "gpu.mem_held" not in {f.id for f in check_gpus(replace(facts, ours=frozenset({41})))}


def test_our_processes_are_those_of_this_service(tmp_path: Path) -> None:
    for pid, stamp in ((41, "/run/a:e-0:1"), (42, "/run/ab:e-0:1"), (43, "")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "environ").write_bytes(f"X=1\0PDCTL_UNIT={stamp}\0".encode() if stamp else b"X=1\0")
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (python) S 1 {pid} {pid} 0")
    (tmp_path / "44").mkdir()
    assert our_processes("/run/a", tmp_path) == [41]


def test_two_engines_that_do_not_fit_together(library: Path, tmp_path: Path) -> None:
    shared = TOPOLOGY.replace("gpus = [0]", "gpus = [0]\nreplicas = 2\nshare_gpu = true")
    found = doctor(library, tmp_path, shared.replace("kv_cache_gb = 1.0", "kv_cache_gb = 80.0"), "0 mode 3\n")
    assert found["gpu.memory"]["severity"] == "critical"
    # Of twice 80 GiB, minus 2 GiB and the model's weights per engine, if the model exists.
    fits = re.search(r"kv_cache_gb = (\S+) for each", found["gpu.memory"]["fix"])
    assert fits is not None
    assert 68 < float(fits[1]) <= 68.5
    assert found["gpu.mode"]["severity"] == "critical", "EXCLUSIVE_PROCESS"
    found = doctor(library, tmp_path, shared.replace("kv_cache_gb = 1.0", f"kv_cache_gb = {fits[1]}"))
    assert "gpu.memory" not in found


def test_a_runtime_that_the_driver_is_too_old_for() -> None:
    gpu = GpuHealth(Gpu(0, "GPU-x", "x", 1, "0000:01:00.0"))

    def severity(runtime: tuple[int, int] | None) -> str:
        found = check_gpus(GpuFacts(GpuReport((gpu,), driver="535", cuda=(12, 2)), runtime_cuda=runtime))
        return next((f.severity.value for f in found if f.id == "gpu.cuda"), "")

    assert [severity(v) for v in ((13, 0), (12, 8), (12, 2), (11, 8), None)] == ["critical", "warning", "ok", "ok", ""]


def test_a_gpu_that_the_plan_does_not_use_is_not_judged(library: Path, tmp_path: Path) -> None:
    """pdctl gives the only engine GPU 0, so problems of GPU 1 do not matter."""
    chosen = TOPOLOGY.replace("gpus = [0]\n", "")
    assert set(doctor(library, tmp_path, chosen, "1 mig 1\n1 mode 2\n")) == {"gpu.present", "topology.valid"}
    assert doctor(library, tmp_path, chosen, "0 mig 1\n")["gpu.mig"]["severity"] == "critical"


def test_a_gpu_that_is_lost(library: Path, tmp_path: Path) -> None:
    """NVML counts the GPU but fails to open it (Xid 79)."""
    found = doctor(library, tmp_path, "", "1 lost 1\n")
    assert found["gpu.count"]["subject"] == "GPU 1"
    assert found["gpu.count"]["severity"] == "critical"
    assert found["gpu.present"]["subject"] == "GPU 0"


def test_a_gpu_that_fell_off_the_bus(tmp_path: Path) -> None:
    for address in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "driver/nvidia/gpus" / address).mkdir(parents=True)
    gpu = GpuHealth(Gpu(0, "GPU-x", "x", 1, "0000:01:00.0"))
    facts = GpuFacts(GpuReport((gpu,)), is_wanted=True, proc_root=tmp_path)
    found = [f for f in check_gpus(facts) if f.id == "gpu.count"]
    assert [(f.subject, f.severity) for f in found] == [("GPU at 0000:02:00.0", Severity.CRITICAL)]
    (tmp_path / "driver/nvidia/gpus/0000:02:00.0").rmdir()
    assert not [f for f in check_gpus(GpuFacts(GpuReport((gpu,)), proc_root=tmp_path)) if f.id == "gpu.count"]


def board(root: Path) -> AffinityFacts:
    """Two switches with a GPU and a card each, and a card on the other socket."""
    tree = Tree(root)
    gpus = []
    for number, bus in enumerate((0x10, 0x20)):
        base = f"pci0000:{bus:02x}/0000:{bus:02x}:01.0/0000:{bus + 1:02x}:00.0"
        address = f"0000:{bus + 3:02x}:00.0"
        tree.pci(f"{base}/0000:{bus + 2:02x}:01.0/{address}", vendor="0x10de")
        tree.pci(f"{base}/0000:{bus + 2:02x}:02.0/0000:{bus + 4:02x}:00.0")
        gpus.append((f"GPU {number}", address, f"GPU-{number}"))
    tree.hca("far_0", {1: Port()}, bus=0x80, node=1)
    cards = {"near_0": "0000:14:00.0", "near_1": "0000:24:00.0", "far_0": "0000:81:00.0"}
    return AffinityFacts(tuple(gpus), tuple(cards), read_layout([gpu[1] for gpu in gpus], cards, root))


def test_the_nearest_card_is_each_gpus_own(tmp_path: Path) -> None:
    facts = board(tmp_path / "sys")
    assert pairing(facts) == {"GPU 0": "near_0", "GPU 1": "near_1"}
    lines = matrix(facts).splitlines()
    assert lines[1].split() == ["GPU", "0", "0000:13:00.0", "PIX", "*", "NODE", "SYS", "0"]
    assert lines[2].split() == ["GPU", "1", "0000:23:00.0", "NODE", "PIX", "*", "SYS", "0"]


@pytest.mark.parametrize(("device", "severity"), [("near_0", "ok"), ("near_1", "warning"), ("far_0", "critical")])
def test_a_plan_that_pairs_worse_than_it_could(tmp_path: Path, device: str, severity: str) -> None:
    from types import SimpleNamespace

    spec = SimpleNamespace(name="decode-0", gpus=("GPU-0",), rdma=(device,))
    plan = cast(Plan, SimpleNamespace(processes=(spec,)))  # what the check looks at of one
    facts = board(tmp_path / "sys")
    found = check(AffinityFacts(facts.gpus, facts.devices, facts.layout, plan))
    assert [(f.id, f.severity.value) for f in found] == [("pcie.affinity", severity)]
    if severity != "ok":
        assert "remove devices" in found[0].fix
