"""Imported by each Python process that is started with tests.fakes.gpu.environment()."""

from __future__ import annotations

import os
import sys

if folder := os.environ.get("TEST_CUDA_LIBRARIES"):
    import importlib.abc
    import importlib.machinery
    from collections.abc import Sequence
    from types import ModuleType

    _PATCHED = [
        f"pdctl.engine.{name}" for name in ("cache.kv_pool", "executor.exported", "executor.gpu_memory")
    ]

    class _Patching(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        """Patches some modules when they are imported, before others import from them."""

        def __init__(self) -> None:
            self._loaders: dict[str, importlib.abc.Loader] = {}

        def find_spec(
            self, name: str, path: Sequence[str] | None, target: ModuleType | None = None, /
        ) -> importlib.machinery.ModuleSpec | None:
            if name not in _PATCHED:
                return None
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            assert spec is not None
            assert spec.loader is not None
            self._loaders[name] = spec.loader
            spec.loader = self
            return spec

        def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
            return None

        def exec_module(self, module: ModuleType) -> None:
            self._loaders[module.__name__].exec_module(module)
            from tests.fakes.gpu import patches

            patches.apply(module)

    sys.meta_path.insert(0, _Patching())
