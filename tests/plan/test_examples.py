"""The topologies in docs/examples, planned on a machine with 8 GPUs, two NUMA nodes and a NIC beside each GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pdctl.host import Gpu, Host
from pdctl.host.devices.pci import Layout
from pdctl.host.devices.rdma import RdmaDevice
from pdctl.plan import ProcessSpec, make_plan
from pdctl.topology.loader import load_file

EXAMPLES = Path(__file__).parents[2] / "docs/examples"
GPUS = tuple(Gpu(n, f"GPU-{n}", "NVIDIA H100 80GB HBM3", 80 << 30, f"0000:{n}0:00.0") for n in range(8))
LAYOUT = Layout(
    nodes={gpu.pci: gpu.index // 4 for gpu in GPUS},
    cpus={0: tuple(range(48)), 1: tuple(range(48, 96))},
    classes={
        (gpu.pci, f"mlx5_{n}"): "PIX" if gpu.index == n else "NODE" if gpu.index // 4 == n // 4 else "SYS"
        for gpu in GPUS
        for n in range(8)
    },
)
VERSIONS = {"vllm": "0.32.0", "sglang": "0.5.23", "lmdeploy": "0.18.0"}


def host(tmp_path: Path, kind: str) -> Host:
    rdma = tuple(RdmaDevice(f"mlx5_{n}", f"0000:{n}1:00.0", True) for n in range(8))
    made = Host(tuple(range(96)), GPUS, 2 << 40, {}, "python3", tmp_path, tmp_path, tmp_path, rdma, LAYOUT)
    return replace(made, package_in=lambda python, names: (kind, VERSIONS[kind]) if names else None)


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> dict[str, ProcessSpec]:
    """The processes of the example that the test names, by name. Its interpreter exists in the user's home folder."""
    name: str = request.param
    kind = name.split("-")[0]
    python = tmp_path / kind / "bin/python"
    python.parent.mkdir(parents=True)
    python.touch(mode=0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    on = host(tmp_path, kind)
    return {spec.name: spec for spec in make_plan(load_file(EXAMPLES / name, on), on).processes}


def option(spec: ProcessSpec, name: str) -> str:
    return spec.argv[spec.argv.index(name) + 1]


def test_the_readme_lists_every_example() -> None:
    text = (EXAMPLES / "README.md").read_text()
    assert all(f"[{path.name}]({path.name})" in text for path in EXAMPLES.glob("*.toml"))


@pytest.mark.parametrize("planned", ["vllm-4p4d.toml", "sglang-4p4d.toml", "lmdeploy-4p4d.toml"], indirect=True)
def test_eight_engines_of_one_gpu(planned: dict[str, ProcessSpec]) -> None:
    names = [f"{role}-{n}" for role in ("prefill", "decode") for n in range(4)]
    assert [*planned] == [*names, "proxy"]
    for number, name in enumerate(names):
        spec = planned[name]
        assert spec.gpus == (f"GPU-{number}",)
        assert spec.env["CUDA_VISIBLE_DEVICES"] == f"GPU-{number}"
        assert spec.rdma == (f"mlx5_{number}",)
        assert spec.cpus == (tuple(range(48)) if number < 4 else tuple(range(48, 96))), "the NUMA node of its GPU"
        assert f"mlx5_{number}" in " ".join((*spec.argv, *spec.env.values()))
        assert option(spec, "--server-port" if spec.kind == "lmdeploy" else "--port") == str(spec.ports["http"])
    ports = [port for spec in planned.values() for port in spec.ports.values()]
    assert len(set(ports)) == len(ports)


@pytest.mark.parametrize("planned", ["vllm-2p1d-tp.toml", "sglang-2p1d-tp.toml"], indirect=True)
def test_engines_over_several_gpus(planned: dict[str, ProcessSpec]) -> None:
    assert [planned[name].gpus for name in ("prefill-0", "prefill-1", "decode-0")] == [
        ("GPU-0", "GPU-1"), ("GPU-2", "GPU-3"), ("GPU-4", "GPU-5", "GPU-6", "GPU-7"),
    ]  # fmt: skip
    assert planned["decode-0"].rdma == ("mlx5_4", "mlx5_5", "mlx5_6", "mlx5_7")


@pytest.mark.parametrize("planned", ["lmdeploy-1p1d-tp.toml"], indirect=True)
def test_lmdeploy_over_several_gpus(planned: dict[str, ProcessSpec]) -> None:
    assert planned["prefill-0"].gpus == ("GPU-0", "GPU-1", "GPU-2", "GPU-3")
    assert [option(planned[name], "--tp") for name in ("prefill-0", "decode-0")] == ["4", "4"]


@pytest.mark.parametrize("planned", ["vllm-2p1d-tp.toml"], indirect=True)
def test_vllm_as_a_person_would_have_written_it(planned: dict[str, ProcessSpec]) -> None:
    spec = planned["decode-0"]
    assert spec.argv[3:] == (
        "serve", "meta-llama/Llama-3.3-70B-Instruct",
        "--served-model-name", "Llama-3.3-70B-Instruct",
        "--host", "127.0.0.1",
        "--port", str(spec.ports["http"]),
        "--max-model-len", "32768",
        "--tensor-parallel-size", "4",
        "--dtype", "auto",
        "--kv-transfer-config", json.dumps(
            {
                "kv_connector": "NixlConnector", "kv_role": "kv_consumer", "kv_load_failure_policy": "fail",
                "kv_connector_extra_config": {"kv_lease_duration": 30},
            },
            separators=(",", ":"),
        ),
    )  # fmt: skip
    assert spec.env == {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(spec.ports["side-channel"]),
        "VLLM_PORT": str(spec.ports["internal"]),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "GPU-4,GPU-5,GPU-6,GPU-7",
        "UCX_NET_DEVICES": "mlx5_4:1,mlx5_5:1,mlx5_6:1,mlx5_7:1",
        "UCX_IB_GID_INDEX": "3",
    }
