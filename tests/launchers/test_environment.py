"""What an agent finds in its environment, and which GPUs."""

from __future__ import annotations

import os

import pytest

from pdctl.host.devices.gpu import Gpu
from pdctl.launchers.environment import environment_of, parse_environment, reserved_gpus

GPUS = tuple(Gpu(index, f"GPU-{index}{index}", "H200", 1) for index in range(4))
WORKER = {
    "HOME": "/root", "OMP_NUM_THREADS": "1", "SPT_NOENV": "1", "PYTHONBREAKPOINT": "ray.util.rpdb.set_trace",
    "RAY_JOB_ID": "01", "RAY_AUTH_TOKEN": "secret", "CUDA_VISIBLE_DEVICES": "0,1",
}  # fmt: skip


def test_the_agent_gets_the_nodes_own_environment() -> None:
    raylet = {
        "HOME": "/root", "OMP_NUM_THREADS": "4", "PDCTL_RUN": "/run/pdctl", "RAY_AUTH_TOKEN": "secret",
        "LD_PRELOAD": "/x/ray/core/libjemalloc.so",
    }  # fmt: skip
    assert environment_of(raylet, WORKER, None) == {
        "HOME": "/root", "OMP_NUM_THREADS": "4", "PDCTL_RUN": "/run/pdctl"
    }  # fmt: skip


@pytest.mark.parametrize("between", [":", " "])
def test_libraries_that_the_node_preloads_stay(between: str) -> None:
    raylet = {"LD_PRELOAD": between.join(["/x/ray/core/libjemalloc.so", "/lib/a.so", "/lib/b.so"])}
    assert environment_of(raylet, {}, None) == {"LD_PRELOAD": "/lib/a.so:/lib/b.so"}


def test_without_the_raylets_the_workers_is_used_without_what_ray_put_there() -> None:
    assert environment_of(None, WORKER, None) == {"HOME": "/root"}
    assert environment_of(None, WORKER, "GPU-00") == {"HOME": "/root", "CUDA_VISIBLE_DEVICES": "GPU-00"}


@pytest.mark.parametrize(
    ("given", "found"),
    [("0,1,2,3", None), ("2,3", "GPU-22,GPU-33"), ("GPU-11", "GPU-11"), (None, ""), ("", "")],
)
def test_gpus_are_named_by_uuid_where_not_all_are_reserved(given: str | None, found: str | None) -> None:
    assert reserved_gpus(GPUS, given) == found


def test_a_node_without_gpus_hides_none() -> None:
    assert reserved_gpus((), "0,1") is None
    assert reserved_gpus((), None) is None


def test_an_environment_is_read_as_the_kernel_shows_it() -> None:
    text = b"A=1\0B=x=y\0\0EMPTY=\0ODD=\xff\0"
    assert parse_environment(text) == {"A": "1", "B": "x=y", "EMPTY": "", "ODD": os.fsdecode(b"\xff")}
