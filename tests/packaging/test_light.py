"""A service on one machine pays nothing for clusters: their code, and what it needs, is not even imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

_HEAVY = (
    "httpx", "ray", "cryptography", "torch", "pdctl.registry.etcd", "pdctl.registry.mirror", "pdctl.supervisor.agent",
    "pdctl.net.identity.contexts",
)  # fmt: skip
_SCRIPT = "import sys, {module}; print(*[name for name in {heavy} if name in sys.modules])"


@pytest.mark.parametrize("module", ["pdctl.supervisor.service.service", "pdctl.commands.control.up", "pdctl.plan"])
def test_what_only_clusters_need_is_not_imported(module: str) -> None:
    script = _SCRIPT.format(module=module, heavy=_HEAVY)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
