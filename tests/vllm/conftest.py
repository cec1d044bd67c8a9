"""Services of real vLLM engines on the CPU. scripts/try-vllm installs vLLM and runs these tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

from pdctl.host.processes.stamps import stamped
from pdctl.supervisor.process.shared_memory import mapped
from tests.service import Run, Service, free_port, running, temporary_run

PYTHON = os.environ.get("PDCTL_VLLM_PYTHON", "")
LEASE_S = 12


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip without vLLM."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skipif(not PYTHON, reason="PDCTL_VLLM_PYTHON is not set: see scripts/try-vllm"))
            item.add_marker(pytest.mark.timeout(3600))


def group(role: str, replicas: int = 1, extra: str = "", args: str = '"--enforce-eager"') -> str:
    return f"""
[[engines]]
name = "{role}"
role = "{role}"
kind = "vllm"
device = "cpu"
python = "{PYTHON}"
replicas = {replicas}
kv_cache_gb = 1
max_num_seqs = 16
args = [{args}]
{extra}
"""


def topology(prefills: int, decodes: int, extra: str = "", port: int | None = None, decode_args: str = "") -> str:
    return alone(
        group("prefill", prefills, extra) + group("decode", decodes, extra, decode_args or '"--enforce-eager"'), port
    )


def alone(groups: str, port: int | None = None) -> str:
    """A topology of these groups."""
    return f"""
[service]
name = "t"
model = "sample:tiny-chat"
served_model_name = "m"
max_model_len = 1024
[proxy]
port = {port or free_port()}
[transfer]
lease_s = {LEASE_S}
[supervisor]
grace_s = 20
{groups}
"""


def tree_of(service: Service, name: str) -> list[int]:
    """The pids of an engine's processes."""
    return stamped(f"PDCTL_UNIT={service.run.folder / 'r' / service.name}:{name}")


def shared_memory(run: Run) -> set[str]:
    """Files of shared memory that the processes of a run map now."""
    return mapped(process.pid for process in run.processes())


def left_of(paths: set[str]) -> list[str]:
    """Those of these files that still exist."""
    return sorted(path for path in paths if Path(path).exists())


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """One prefill and one decode engine. Nothing may be left of them, not even shared memory."""
    with temporary_run() as run:
        with running(run, topology(1, 1)) as found:
            yield found
            used = shared_memory(run)
        assert not left_of(used)


class Direct(AbstractContextManager["Direct"]):
    """One vLLM engine of a service, called without the proxy: the single vLLM with which answers are compared."""

    def __init__(self, service: Service, name: str) -> None:
        port = service.process(name).ports["http"]
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=300, trust_env=False, headers=service.internal
        )

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def complete(self, prompt: str, **options: object) -> list[int]:
        body = {"model": "m", "prompt": prompt, "temperature": 0, "return_token_ids": True, **options}
        answer = self.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["choices"][0]["token_ids"])
