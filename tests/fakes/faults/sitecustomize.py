"""In an engine's process: while the file PDCTL_TEST_FAULT exists, steps raise the error that it names.

Python imports a module of this name at its start, if its folder is in PYTHONPATH."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_RUNNER = "pdctl.engine.model.runner"


def _plant(runner: ModuleType) -> None:
    import torch

    real: Callable[..., Any] = runner.ModelRunner.execute
    errors = {
        "memory": torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB of which 1 is free."
        ),
        "sticky": RuntimeError(
            "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"
        ),
    }

    def execute(self: object, batch: list[Any]) -> Any:
        fault = Path(os.environ["PDCTL_TEST_FAULT"])
        if fault.exists():
            raise errors[fault.read_text()]
        return real(self, batch)

    runner.ModelRunner.execute = execute


class _Planter(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _RUNNER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            _plant(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "PDCTL_TEST_FAULT" in os.environ:
    sys.meta_path.insert(0, _Planter())
