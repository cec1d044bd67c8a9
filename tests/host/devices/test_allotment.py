"""GPUs that the environment makes available, by the rules of each variable."""

from __future__ import annotations

import pytest

from pdctl.host.devices.allotment import allotted, allotted_rdma
from pdctl.host.devices.gpu import Gpu
from pdctl.host.devices.rdma import RdmaDevice

GPUS = tuple(Gpu(n, f"GPU-{letter}{n}00000-0000-0000-0000-000000000000", "H200", 1) for n, letter in enumerate("aabc"))


@pytest.mark.parametrize(
    ("environ", "indices"),
    [
        ({}, [0, 1, 2, 3]),
        ({"CUDA_VISIBLE_DEVICES": "2,0"}, [2, 0]),
        ({"CUDA_VISIBLE_DEVICES": f"{GPUS[3].uuid},{GPUS[1].uuid}"}, [3, 1]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-b2,GPU-a1"}, [2, 1]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-a"}, []),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, []),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, []),
        ({"CUDA_VISIBLE_DEVICES": "1,-1,2"}, [1]),
        ({"CUDA_VISIBLE_DEVICES": "1,9,2"}, [1]),
        ({"CUDA_VISIBLE_DEVICES": "1,1"}, [1]),
        ({"CUDA_VISIBLE_DEVICES": "1", "NVIDIA_VISIBLE_DEVICES": "2", "SLURM_JOB_GPUS": "3"}, [1]),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, [0, 1, 2, 3]),
        ({"NVIDIA_VISIBLE_DEVICES": "void"}, []),
        ({"NVIDIA_VISIBLE_DEVICES": "none"}, []),
        ({"NVIDIA_VISIBLE_DEVICES": GPUS[2].uuid}, [2]),
        ({"NVIDIA_VISIBLE_DEVICES": "1,3"}, [1, 3]),
        # As many as the driver lists: in a container that hides the others and renumbers.
        ({"NVIDIA_VISIBLE_DEVICES": "4,5,6,7"}, [0, 1, 2, 3]),
        ({"SLURM_JOB_GPUS": "2,3"}, [2, 3]),
        ({"SLURM_STEP_GPUS": "2", "SLURM_JOB_GPUS": "2,3"}, [2]),
    ],
    ids=str,
)
def test_what_is_left_to_us(environ: dict[str, str], indices: list[int]) -> None:
    found, by = allotted(GPUS, environ)
    assert [gpu.index for gpu in found] == indices
    assert bool(by) == (indices != [0, 1, 2, 3])


def test_a_slice_is_used_by_its_name() -> None:
    found, _ = allotted(GPUS, {"CUDA_VISIBLE_DEVICES": "MIG-12345678-1234-1234-1234-123456789012"})
    assert [gpu.uuid for gpu in found] == ["MIG-12345678-1234-1234-1234-123456789012"]


NICS = tuple(RdmaDevice(f"mlx5_{n}", "", True) for n in (0, 1, 2, 10))


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({}, "0 1 2 10"),
        ({"UCX_NET_DEVICES": "all"}, "0 1 2 10"),
        ({"UCX_NET_DEVICES": "mlx5_1:1,mlx5_10:1"}, "1 10"),
        ({"UCX_NET_DEVICES": "eth0"}, ""),
        ({"NCCL_IB_HCA": "mlx5_1"}, "1 10"),
        ({"NCCL_IB_HCA": "=mlx5_1:1"}, "1"),
        ({"NCCL_IB_HCA": "^mlx5_1"}, "0 2"),
        ({"NCCL_IB_HCA": "^=mlx5_1"}, "0 2 10"),
        ({"MC_MS_FILTERS": "mlx5_2", "UCX_NET_DEVICES": "mlx5_0:1"}, "2"),
        ({"MC_TE_FILTERS": "mlx5_0,mlx5_2"}, "0 2"),
    ],
    ids=str,
)
def test_rdma_devices_that_are_left_to_us(environ: dict[str, str], names: str) -> None:
    found, by = allotted_rdma(NICS, environ)
    assert [device.name for device in found] == [f"mlx5_{n}" for n in names.split()]
    assert bool(by) == (len(found) < len(NICS))


def test_a_device_without_a_node_was_not_given_to_us() -> None:
    found, by = allotted_rdma((NICS[0], RdmaDevice("mlx5_3", "", True, has_node=False)), {})
    assert ([device.name for device in found], by) == (["mlx5_0"], "/dev/infiniband")
