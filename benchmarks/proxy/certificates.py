"""What TLS between proxy and engines costs the proxy: the same mock workers, with certificates and without, in turn.

    python -m benchmarks.proxy.certificates [--rounds 5]

As in `python -m benchmarks.proxy`; the clients speak plain HTTP in both cases.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import uvloop

from benchmarks.proxy.__main__ import CASES, measure, show
from benchmarks.proxy.mock import Answers, Worker
from benchmarks.proxy.peers import DECODE, PREFILL, Proxy, await_port, pinned
from pdctl.net.identity import CERTIFICATES_ENV, identity_in
from pdctl.net.serving import listen_tcp
from pdctl.proxy_wire import EngineAddress, ProxyConfig
from pdctl.wire import LISTEN_FD_ENV
from tests.certificates import made_ca, made_node

# Of the workers with certificates, beside those without.
_SHIFT = 50
_CHUNKS = 64


async def _workers(folder: str) -> None:
    """Both workers, with certificates and without: one process, so that all have the same share of a CPU."""
    answers, loop = Answers(_CHUNKS), asyncio.get_running_loop()
    context = identity_in(folder).server_context()
    async with asyncio.TaskGroup() as tasks:
        for port in (PREFILL, DECODE):
            for shift, tls in ((0, None), (_SHIFT, context)):
                listener = listen_tcp("127.0.0.1", port + shift, 4096)
                await loop.create_server(lambda: Worker(answers, tasks), sock=listener, ssl=tls)
        await asyncio.Event().wait()


@contextmanager
def _proxy(name: str, folder: Path, certificates: str) -> Iterator[Proxy]:
    shift = _SHIFT if certificates else 0
    engines = [
        EngineAddress(role, role, "vllm", "127.0.0.1", port + shift, slot=slot, tls=bool(certificates))
        for slot, (role, port) in enumerate((("prefill", PREFILL), ("decode", DECODE)))
    ]
    run_dir = folder / name
    (run_dir / "ipc").mkdir(parents=True)
    config = ProxyConfig(
        service="bench", model="mock", routing="min_expected_latency", ttft_ms=1000, tpot_ms=50, max_model_len=4096,
        engines=engines, run_dir=str(run_dir),
    )  # fmt: skip
    (run_dir / "proxy.json").write_bytes(msgspec.json.encode(config))
    with listen_tcp("127.0.0.1", 0) as listener, (run_dir / "log").open("w") as log:
        env = {**os.environ, LISTEN_FD_ENV: str(listener.fileno())}
        if certificates:
            env[CERTIFICATES_ENV] = certificates
        argv = pinned(0, sys.executable, "-m", "pdctl.proxy", "--config", run_dir / "proxy.json")
        child = subprocess.Popen(argv, env=env, pass_fds=(listener.fileno(),), stdout=log, stderr=log)
        try:
            port = listener.getsockname()[1]
            await_port(port, child)
            yield Proxy(name, port, child.pid)
        finally:
            child.kill()
            child.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--workers", help=argparse.SUPPRESS)
    found = parser.parse_args()
    if found.workers:
        uvloop.run(_workers(found.workers))
        return
    with tempfile.TemporaryDirectory() as made, ExitStack() as stack:
        folder = Path(made)
        certificates = str(made_node(made_ca(folder / "ca"), folder / "node", "a", "127.0.0.1"))
        argv = pinned(1, sys.executable, "-m", "benchmarks.proxy.certificates", "--workers", certificates)
        stack.callback(subprocess.Popen(argv).kill)
        proxies = [
            stack.enter_context(_proxy(name, folder, given)) for name, given in (("pdctl", ""), ("tls", certificates))
        ]
        for case in found.cases.split(","):
            rows: dict[str, list[dict[str, float]]] = {proxy.name: [] for proxy in proxies}
            for number in range(found.rounds):
                for proxy in proxies if number % 2 else proxies[::-1]:
                    rows[proxy.name].append(measure(proxy, case))
            show(case, rows)


if __name__ == "__main__":
    main()
