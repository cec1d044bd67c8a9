"""A stand-in for GPUs in engines' processes: pools are memory apart from what engines share on CPUs, and CUDA's calls
that map them are those of tests/fakes/cudart. Models compute on the CPU, and ranks exchange tensors by gloo.

Python imports `sitecustomize` of this folder when a process starts with `environment`.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.fakes import cudart

FOLDER = Path(__file__).parent
LIBRARIES_ENV = "TEST_CUDA_LIBRARIES"


def environment(folder: Path) -> dict[str, str]:
    """What engines are started with. The CUDA runtime is built in `folder`."""
    cudart.build(folder)
    path = [str(FOLDER), str(FOLDER.parents[2]), os.environ.get("PYTHONPATH", "")]
    return {LIBRARIES_ENV: str(folder), "PYTHONPATH": os.pathsep.join(filter(None, path))}
