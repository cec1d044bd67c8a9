"""GPUs that the environment leaves to us, by the rules of whoever names them."""

from __future__ import annotations

import pytest

from pdctl.host.allotment import allotted
from pdctl.host.gpu import Gpu

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
        # As many as the driver lists: in a container, which hides the others and counts anew.
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
