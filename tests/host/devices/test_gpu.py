"""The real pynvml over a stub driver library: this tests its ctypes signatures, not the hardware."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STUB = Path(__file__).parents[2] / "fakes" / "nvml_stub.c"
READ = (
    "import json; from pdctl.host.devices.gpu import read_gpus;"
    "print(json.dumps([[g.index, g.uuid, g.name, g.memory] for g in read_gpus()]))"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nvml")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "libnvidia-ml.so.1", STUB], check=True)
    return folder


def read(library: Path, gpus: str | None) -> list[list[object]]:
    env = {**os.environ, "LD_LIBRARY_PATH": str(library)}
    if gpus is not None:
        env["PDCTL_STUB_GPUS"] = gpus
    done = subprocess.run([sys.executable, "-c", READ], env=env, capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout))


def test_gpus_are_read_through_nvml(library: Path) -> None:
    assert read(library, "2") == [
        [0, "GPU-stub-0", "Stub H200", 141 << 30],
        [1, "GPU-stub-1", "Stub H200", 141 << 30],
    ]


def test_no_gpu_no_driver_no_library(library: Path, tmp_path: Path) -> None:
    assert read(library, "0") == []
    assert read(library, None) == [], "driver not loaded"
    assert read(tmp_path, "2") == [], "no library at all"


def test_the_default_topology_uses_the_gpus_found(library: Path, tmp_path: Path) -> None:
    env = {**os.environ, "LD_LIBRARY_PATH": str(library), "PDCTL_STUB_GPUS": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "pdctl", "plan", "--json"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    processes = json.loads(done.stdout)["processes"]
    assert [p["gpus"] for p in processes] == [["GPU-stub-0"], ["GPU-stub-1"], []]
    assert processes[1]["env"]["CUDA_VISIBLE_DEVICES"] == "GPU-stub-1"


def test_addresses_are_written_as_sysfs_does(library: Path) -> None:
    code = "from pdctl.host.devices.gpu import read_gpus; print([g.pci for g in read_gpus()])"
    env = {**os.environ, "LD_LIBRARY_PATH": str(library), "PDCTL_STUB_GPUS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['0000:10:00.0', '0000:11:00.0']"


def test_who_uses_what(library: Path, tmp_path: Path) -> None:
    use = tmp_path / "use"
    use.write_text("1 41 1000\n1 42 500\n0 43 7\n")
    code = "from pdctl.host.devices.gpu import gpu_use; print(gpu_use(['GPU-stub-1', 'GPU-stub-9']))"
    env = {**os.environ, "LD_LIBRARY_PATH": str(library), "PDCTL_STUB_GPUS": "2", "PDCTL_STUB_USE": str(use)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'GPU-stub-1': GpuUse(used=1500, by_pid={41: 1000, 42: 500})}"


def test_what_the_environment_allots_and_who_computes_where(library: Path, tmp_path: Path) -> None:
    """`pdctl plan` with four GPUs: three are available, and this test uses one of those."""
    use = tmp_path / "use"
    use.write_text(f"1 {os.getpid()} {20 << 30}\n")
    (tmp_path / "pdctl.toml").write_text(
        '[service]\nmodel = "sample:tiny-qwen3"\n'
        '[[engines]]\nname = "h"\nrole = "hybrid"\ndevice = "cuda"\nreplicas = 3\n'
    )
    env = {
        **os.environ, "LD_LIBRARY_PATH": str(library), "PDCTL_STUB_GPUS": "4", "PDCTL_STUB_USE": str(use),
        "CUDA_VISIBLE_DEVICES": "GPU-stub-1,GPU-stub-3,GPU-stub-2",
    }  # fmt: skip
    argv = [sys.executable, "-m", "pdctl", "plan", "--json"]
    done = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = [p["gpus"] for p in json.loads(done.stdout)["processes"] if p["kind"] != "proxy"]
    assert found == [["GPU-stub-3"], ["GPU-stub-2"], ["GPU-stub-1"]], "ours alone, in that order, idle ones first"
    shown = subprocess.run(argv[:-1], env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"warning: h-2: GPU GPU-stub-1 is in use by pid {os.getpid()}" in shown.stderr
    refused = subprocess.run(
        argv, env={**env, "CUDA_VISIBLE_DEVICES": "-1"}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert "pdctl.toml:6: engines[0].device: the environment makes no GPU available" in refused.stderr


def test_how_far_gpus_are_from_each_other(library: Path, tmp_path: Path) -> None:
    health = tmp_path / "health"
    # NVLink between 0 and 2, also where the PCI tree says "across sockets"; nothing is known of 1 and 2.
    health.write_text("0 nvlink2 1\n0 far2 50\n0 far1 10\n1 nvlink2 0\n")
    code = "from pdctl.host.devices.gpu import read_gpus; print([dict(g.distances) for g in read_gpus()])"
    env = {**os.environ, "LD_LIBRARY_PATH": str(library), "PDCTL_STUB_GPUS": "3", "PDCTL_STUB_HEALTH": str(health)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    one, two, three = "GPU-stub-0", "GPU-stub-1", "GPU-stub-2"
    assert done.stdout.strip() == str([{two: 2, three: 0}, {one: 2}, {one: 0}])


def test_plan_warns_of_gpus_on_different_sockets(library: Path, tmp_path: Path) -> None:
    health = tmp_path / "health"
    health.write_text("0 far1 50\n0 far2 50\n0 far3 50\n1 far2 50\n1 nvlink3 1\n2 far3 50\n")
    (tmp_path / "pdctl.toml").write_text(WIDE.replace("PYTHON", str(_with_vllm(tmp_path))))
    env = {**os.environ, "LD_LIBRARY_PATH": str(library), "PDCTL_STUB_GPUS": "4", "PDCTL_STUB_HEALTH": str(health)}
    shown, told = (
        subprocess.run(
            [sys.executable, "-m", "pdctl", "plan", *words], env=env, cwd=tmp_path, capture_output=True, text=True,
            check=True,
        )
        for words in (["--json"], [])
    )  # fmt: skip
    processes = {process["name"]: process for process in json.loads(shown.stdout)["processes"]}
    assert processes["near-0"]["gpus"] == ["GPU-stub-1", "GPU-stub-3"]
    assert processes["near-0"]["why"]["gpus"].endswith("; connected by NVLink")
    assert processes["far-0"]["gpus"] == ["GPU-stub-0", "GPU-stub-2"]
    assert "far-0: GPUs GPU-stub-0,GPU-stub-2 are on different sockets" in " ".join(told.stderr.split())
    assert "near-0: GPUs" not in told.stderr


WIDE = """
[service]
model = "sample:tiny-qwen3"
[[engines]]
name = "near"
role = "prefill"
kind = "vllm"
python = "PYTHON"
device = "cuda"
tensor_parallel = 2
[[engines]]
name = "far"
role = "decode"
kind = "vllm"
python = "PYTHON"
device = "cuda"
tensor_parallel = 2
"""


def _with_vllm(folder: Path) -> Path:
    """The interpreter of an environment that says it has vLLM."""
    packages = folder / "engine" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    for name in ("vllm-0.32.0", "nixl-1.0.0"):
        (packages / f"{name}.dist-info").mkdir(parents=True)
    python = folder / "engine" / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python
