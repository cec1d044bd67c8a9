"""pdctl in a host, with files of its own. The converted models of this machine are shared."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pdctl.host.users import cache_root
from tests.hosts.lab import Host, Program
from tests.service import CLI, REPOSITORY


class Node:
    """A host that runs pdctl. `folder`: its run directory, state and topology."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.name = host.name
        self.folder = host.folder

        # The variables of every pdctl process in this host.
        self.env = {
            "PDCTL_RUN": str(self.folder / "r"),
            "PDCTL_STATE": str(self.folder / "s"),
            "PDCTL_CACHE": str(cache_root()),
            "PDCTL_TRACE_DIR": str(self.folder / "trace"),
            "PDCTL_POISON_FREED": "1",
            "PYTHONPATH": str(REPOSITORY),
        }

    def cli(self, *words: str, check: bool = False, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Execute a command of pdctl."""
        done = self.host.run([*CLI, *words], self.env, timeout)
        assert not check or done.returncode == 0, f"pdctl {' '.join(words)} on {self.name}: {done.stderr}{done.stdout}"
        return done

    def start(self, *words: str, log: str = "pdctl.log", env: dict[str, str] | None = None) -> Program:
        """Start a command of pdctl that stays."""
        return self.host.start([*CLI, *words], self.folder / log, {**self.env, **(env or {})})

    def python(self, *words: str, log: str, env: dict[str, str] | None = None) -> Program:
        """Start a Python program in this environment."""
        return self.host.start([sys.executable, *words], self.folder / log, {**self.env, **(env or {})})

    def write(self, text: str, name: str = "pdctl.toml") -> Path:
        """A file of this host."""
        path = self.folder / name
        path.write_text(text)
        return path
