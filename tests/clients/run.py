"""`scripts/clients`: start a service on this machine and run each client's script against it with another Python.

python -m tests.clients.run CLIENTS_PYTHON
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.service import Run, running, temporary_run, topology

REPOSITORY = Path(__file__).parents[2]
CLIENTS = (
    "openai_client",
    "anthropic_client",
    "langchain_client",
    "litellm_client",
    "llamaindex_client",
    "instructor_client",
)


def main(python: str) -> int:
    """Returns 0 if every client succeeded."""
    with temporary_run() as run:
        return _drive(run, python)


def _drive(run: Run, python: str) -> int:
    key = run.cli("key", "clients", "--file", str(run.folder / "keys.txt"), check=True).stdout.split()[0]
    failed = []
    with running(run, topology("sample:tiny-chat", extra='api_keys = "keys.txt"')) as service:
        env = {**os.environ, "BASE_URL": f"{service.url}/v1", "API_KEY": key, "OPENAI_API_KEY": key}
        for name in CLIENTS:
            argv = [python, "-m", f"tests.clients.scripts.{name}"]
            done = subprocess.run(
                argv, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300, check=False
            )
            sys.stdout.write(f"{name}: {'passed' if done.returncode == 0 else 'FAILED'}\n{done.stdout}")
            if done.returncode != 0:
                failed.append(name)
                sys.stdout.write(done.stderr[-3000:])
        service.idle()
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
