"""`scripts/gpu` itself, without a GPU: one failing step does not stop the rest, and everything is reported."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import benchmarks.gpu.__main__ as script
from benchmarks.gpu.report import summary


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--tiny", "--out", str(out), *words])
    code = script.main()
    return code, (out / "gpu.txt").read_text()


def test_a_failing_step_does_not_stop_the_rest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def step(name: str, code: str, limit_s: float = 60) -> script.Step:
        return script.Step(name, (sys.executable, "-c", code), limit_s)

    steps = (
        step("crashes", "import os; print('no kernel image', flush=True); os.abort()"),
        step("hangs", "import time; print('waiting', flush=True); time.sleep(600)", limit_s=6),
        step("measures", """print('{"transfer": "cuda_ipc", "mib": 1, "error": "TransferError: no"}'); exit(1)"""),
        step("passes", "print('fine')"),
    )
    monkeypatch.setattr(script, "TINY", steps)
    code, text = run(monkeypatch, tmp_path)
    assert code == 1
    assert "crashes: FAILED (exit code -6)" in text
    assert "| no kernel image" in text
    assert "hangs: FAILED (stopped after 6 s)" in text
    assert "cuda_ipc: TransferError: no" in text
    assert "passes: passed" in text
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [step["ok"] for step in found["steps"]] == [False, False, False, True]


def test_a_step_runs_for_real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, text = run(monkeypatch, tmp_path, "--only", "transfer")
    assert code == 0, text
    assert "shm, blocks: " in text


def test_without_a_gpu_it_is_skipped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(script, "_no_gpu", lambda: "no CUDA device")
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert script.main() == 0
    assert capsys.readouterr().out == "skipped: no CUDA device\n"


def test_all_steps_fit_into_twelve_minutes() -> None:
    assert sum(step.limit_s for step in script.STEPS) <= 720


def test_what_failed_within_a_measurement_is_shown() -> None:
    speed = {
        "shape": "8B", "attention": "triton: agrees", "copy_gb_per_s": 3900, "matrix_tflops": 700.0,
        "graphs": "off: stream capture", "self_check": {"agrees": True}, "decode_eager": [],
        "decode": [
            {"batch": 8, "tokens_per_s": 800.0, "step_ms": 10.0, "of_bandwidth": 0.7, "python_share": 0.04},
            {"batch": 32, "error": "OutOfMemoryError: CUDA out of memory"},
        ],
        "decode_ahead": [
            {"batch": 8, "tokens_per_s": 820.0, "step_ms": 9.7, "of_bandwidth": 0.72, "python_share": 0.01},
        ],
        "prefill": [{"tokens": 512, "tokens_per_s": 9, "ms": 1.0, "of_matrix_rate": 0.5}],
        "peer": [{"batch": 8, "tokens_per_s": 400.0, "step_ms": 20.0}],
    }  # fmt: skip
    backend = {
        "backend": "triton", "agrees": 3, "refuses": {}, "differs": {"window, float16": "RuntimeError: by 0.3"},
        "speed": {"decode 1 x 8192": {"us": 12.0, "of_copy": 0.8}, "prefill 2048": {"us": 9.0, "of_matrix_rate": 0.4}},
    }  # fmt: skip
    steps = [
        {"name": "speed-8B", "ok": False, "why": "exit code 1", "seconds": 9.0, "measured": speed, "last": ["the end"]},
        {"name": "attention", "ok": True, "why": "", "seconds": 1.0, "measured": {"attention": [backend]}},
    ]
    text = summary({"card": "H200"}, steps)
    for line in (
        "  decode batch 8: 800.0 tokens/s, 10.0 ms a step, 70% of the bandwidth's limit, Python 4% of a step",
        "  decode_ahead batch 8: 820.0 tokens/s, 9.7 ms a step, 72% of the bandwidth's limit, Python 1% of a step",
        "  decode batch 32: FAILED: OutOfMemoryError: CUDA out of memory",
        "  generate_batch 8: 400.0 tokens/s, 20.0 ms a step, ours 2.00 times",
        "  | the end",
        "    differs: window, float16: RuntimeError: by 0.3",
        "    decode 1 x 8192: 12.0 us, 80% of a copy",
        "    prefill 2048: 9.0 us, 40% of the matrix rate",
    ):
        assert line in text.splitlines(), text
