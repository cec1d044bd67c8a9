"""A step that fails ends the engine, with the reason and without a token."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch

from pdctl.engine.executor.faults import reason_of
from tests.service import free_port, wait_until

REPOSITORY = Path(__file__).parents[3]
PLANTED = REPOSITORY / "tests/fakes/faults"


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79 GiB"),
            "the GPU's memory ran out in a step: CUDA out of memory. Tried to allocate 2.00 GiB; lower "
            "gpu_memory_utilization or kv_cache_gb",
        ),
        (
            RuntimeError("CUDA error: unspecified launch failure\nFor debugging consider CUDA_LAUNCH_BLOCKING=1"),
            "the GPU failed in a step: CUDA error: unspecified launch failure",
        ),
        (AssertionError("KV was read after"), "a step failed: AssertionError: KV was read after"),
        (ValueError(), "a step failed: ValueError: ValueError"),
        (ValueError("x" * 999), "a step failed: ValueError: " + "x" * 273),
    ],
)
def test_the_reason_is_one_sentence(failure: Exception, reason: str) -> None:
    assert reason_of(failure) == reason


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("memory", "error: the GPU's memory ran out in a step: CUDA out of memory. Tried to allocate 2.00 GiB; lower"),
        ("sticky", "error: the GPU failed in a step: CUDA error: an illegal memory access was encountered"),
    ],
)
def test_an_engine_whose_step_fails_says_why_and_sends_nothing(
    fault: str, reason: str, tiny_model: Path, tmp_path: Path
) -> None:
    port, planted = free_port(), tmp_path / "fault"
    (tmp_path / "ipc").mkdir()
    argv = [
        sys.executable, "-m", "pdctl.engine", "serve", "--name", "e", "--model", str(tiny_model), "--port", str(port),
        "--run-dir", str(tmp_path), "--kv-cache-gb", "0.05", "--open", "true",
        "--served-model-name", "m",
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": f"{PLANTED}:{REPOSITORY}", "PDCTL_TEST_FAULT": str(planted)}
    engine = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        url = f"http://127.0.0.1:{port}"

        def healthy() -> bool:
            assert engine.poll() is None, "the engine ended while it started"
            try:
                return httpx.get(f"{url}/health").status_code == 200
            except httpx.HTTPError:
                return False

        wait_until(healthy, 120, "the engine to be ready")
        body = {"model": "m", "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0}
        whole = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert whole.status_code == 200
        planted.write_text(fault)
        try:
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
            assert answer.status_code >= 500
        except httpx.HTTPError:
            pass  # cut off
        said, _ = engine.communicate(timeout=60)
    finally:
        engine.kill()
        engine.wait()
        assert engine.stdout is not None
        engine.stdout.close()
    assert engine.returncode == 1
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert errors[-1].startswith(reason), said[-2000:]
