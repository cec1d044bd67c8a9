"""Starts vllm-router and LMDeploy's proxy in front of the two engines of a service."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.service import Service, free_port, wait_until

FOLDER = Path(os.environ.get("PDCTL_ROUTERS", Path.home() / ".cache/pdctl/routers"))


VLLM_ROUTER = FOLDER / "vllm-router/bin/vllm-router"
LMDEPLOY = FOLDER / "lmdeploy/bin/lmdeploy"
MISSING = [str(program) for program in (VLLM_ROUTER, LMDEPLOY) if not program.exists()]


def url(service: Service, name: str) -> str:
    return f"http://127.0.0.1:{service.process(name).ports['http']}"


@contextmanager
def vllm_router(service: Service) -> Iterator[httpx.Client]:
    port, metrics = free_port(), free_port()
    argv = [
        str(VLLM_ROUTER), "--vllm-pd-disaggregation", "--policy", "round_robin",
        "--prefill", url(service, "prefill-0"), "--decode", url(service, "decode-0"),
        "--host", "127.0.0.1", "--port", str(port),
        "--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics),
        "--health-check-interval-secs", "1", "--health-success-threshold", "1",
    ]  # fmt: skip
    with _process(argv, service.run.folder / "vllm-router.log", port, "/health") as client:
        yield client


@contextmanager
def lmdeploy_proxy(service: Service) -> Iterator[httpx.Client]:
    port = free_port()
    argv = [
        str(LMDEPLOY), "serve", "proxy", "--server-name", "127.0.0.1", "--server-port", str(port),
        "--serving-strategy", "DistServe", "--disable-cache-status",
    ]  # fmt: skip
    with _process(argv, service.run.folder / "lmdeploy.log", port, "/nodes/status") as client:
        for name, role in (("prefill-0", 2), ("decode-0", 3)):
            added = client.post("/nodes/add", json={"url": url(service, name), "status": {"role": role}})
            assert added.json() == "Added successfully", added.text
        yield client


@contextmanager
def _process(argv: list[str], log: Path, port: int, path: str) -> Iterator[httpx.Client]:
    """Run a router until the block ends; gives a client for it."""
    # LMDeploy's proxy forgets an engine that is down when it looks, which it does each 90 s.
    env = {**os.environ, "LMDEPLOY_CONTROLLER_HEART_BEAT_EXPIRATION": "86400"}
    with (
        log.open("wb") as output,
        subprocess.Popen(argv, env=env, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300, trust_env=False) as client,
    ):

        def is_up() -> bool:
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                return client.get(path).status_code == 200
            except httpx.TransportError:
                return False

        try:
            wait_until(is_up, what=f"{argv[0]} to answer")
            yield client
        finally:
            # Nothing is lost with it, and vllm-router waits half a minute for open connections.
            process.kill()
