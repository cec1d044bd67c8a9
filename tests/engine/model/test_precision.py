from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pdctl.engine.model.precision import choose_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def with_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdctl.engine.model.precision.packs", lambda dtype: True)


def chosen(folder: Path, flags: str, config: str = '{"dtype": "bfloat16"}', wanted: str = "auto") -> torch.dtype:
    (folder / "cpuinfo").write_text(f"processor : 0\nflags\t\t: fpu {flags}\n")
    (folder / "config.json").write_text(config)
    return choose_dtype(wanted, CPU, folder, folder)


@pytest.mark.parametrize("flags", ["avx512f avx512_bf16", "amx_bf16 amx_tile"])
def test_auto_is_bfloat16_on_cpus_that_compute_it(flags: str, tmp_path: Path) -> None:
    assert chosen(tmp_path, flags) is torch.bfloat16
    assert chosen(tmp_path, flags, '{"torch_dtype": "bfloat16"}') is torch.bfloat16
    assert chosen(tmp_path, flags, '{"text_config": {"dtype": "bfloat16"}}') is torch.bfloat16


def test_auto_is_float32_on_other_cpus(tmp_path: Path) -> None:
    assert chosen(tmp_path, "avx2 avx512f avx512_bf16x") is torch.float32
    assert choose_dtype("auto", CPU, tmp_path, tmp_path / "missing") is torch.float32


@pytest.mark.parametrize("config", ['{"dtype": "float32"}', "{}", "[]", "no JSON", '{"dtype": 3}'])
def test_auto_keeps_the_precision_of_other_models(config: str, tmp_path: Path) -> None:
    assert chosen(tmp_path, "avx512_bf16", config) is torch.float32


def test_auto_is_float32_if_torch_cannot_use_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdctl.engine.model.precision.packs", lambda dtype: False)
    assert chosen(tmp_path, "avx512_bf16") is torch.float32


def test_a_name_and_a_gpu_decide_it(tmp_path: Path) -> None:
    assert chosen(tmp_path, "avx512_bf16", wanted="float32") is torch.float32
    assert chosen(tmp_path, "", wanted="bfloat16") is torch.bfloat16
    assert choose_dtype("auto", GPU, tmp_path, tmp_path) is torch.bfloat16
    assert choose_dtype("float16", GPU, tmp_path, tmp_path) is torch.float16
