"""The proxies under test: how each is installed, started in front of the mock workers, and found again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import psutil

from tests.service import free_port

REPOSITORY = Path(__file__).parent.parent.parent
PREFILL, DECODE = 19101, 19201


@dataclass
class Proxy:
    """A running proxy."""

    name: str
    port: int
    pid: int

    def cpu_s(self) -> float:
        """CPU seconds so far of the process and its descendants."""
        leader = psutil.Process(self.pid)
        times = [process.cpu_times() for process in (leader, *leader.children(recursive=True))]
        return sum(found.user + found.system for found in times)

    def rss_mb(self) -> float:
        """Resident memory of the process and its descendants."""
        leader = psutil.Process(self.pid)
        return sum(process.memory_info().rss for process in (leader, *leader.children(recursive=True))) / 2**20


def installed(folder: Path, *packages: str) -> Path:
    """The bin folder of a virtual environment with these packages."""
    bin_ = folder / "bin"
    if not (folder / "done").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([bin_ / "pip", "install", "-q", *packages], check=True)
        (folder / "done").touch()
    return bin_


def pinned(cpu: int, *argv: object) -> list[str]:
    return ["taskset", "-c", str(cpu), *map(str, argv)]


@contextmanager
def process(
    name: str, argv: list[str], port: int, folder: Path, ready: Callable[[], None] = lambda: None
) -> Iterator[Proxy]:
    """Start a proxy, wait until it answers, and stop it afterwards. `ready`: called before it can answer."""
    log = (folder / f"{name}.log").open("w")
    child = subprocess.Popen(argv, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        ready()
        await_port(port, child)
        yield Proxy(name, port, child.pid)
    finally:
        for found in psutil.Process(child.pid).children(recursive=True):
            found.kill()
        child.kill()
        child.wait()


def await_port(port: int, child: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + 60
    body = {"model": "mock", "prompt": "x", "max_tokens": 2, "stream": False}
    while time.monotonic() < deadline:
        if child is not None and child.poll() is not None:
            raise SystemExit(f"the proxy ended with {child.returncode}; see its log")
        try:
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=5, trust_env=False)
            if answer.status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"nothing answers on port {port}")


@contextmanager
def vllm_router(cpu: int, folder: Path) -> Iterator[Proxy]:
    bin_ = installed(folder / "vllm-router", "vllm-router==0.1.17")
    port = free_port()
    argv = pinned(
        cpu, bin_ / "vllm-router", "--vllm-pd-disaggregation", "--prefill", f"http://127.0.0.1:{PREFILL}",
        "--decode", f"http://127.0.0.1:{DECODE}", "--policy", "round_robin", "--host", "127.0.0.1", "--port", port,
        "--prometheus-port", free_port(), "--prometheus-host", "127.0.0.1", "--log-level", "warning",
    )  # fmt: skip
    with process("vllm-router", argv, port, folder) as found:
        yield found


@contextmanager
def sglang_router(cpu: int, folder: Path) -> Iterator[Proxy]:
    bin_ = installed(folder / "sglang-router", "sglang-router==0.3.2")
    port = free_port()
    argv = pinned(
        cpu, bin_ / "python", "-m", "sglang_router.launch_router", "--pd-disaggregation",
        "--prefill", f"http://127.0.0.1:{PREFILL}", "8998", "--decode", f"http://127.0.0.1:{DECODE}",
        "--policy", "round_robin", "--host", "127.0.0.1", "--port", port,
        "--prometheus-port", free_port(), "--prometheus-host", "127.0.0.1", "--log-level", "warn",
    )  # fmt: skip
    with process("sglang-router", argv, port, folder) as found:
        yield found


# Only what the proxy imports: the package's own requirements include gigabytes of CUDA.
_LMDEPLOY = (
    "torch==2.13.0", "fastapi", "uvicorn", "aiohttp", "requests", "numpy", "pydantic", "pyzmq", "mmengine-lite", "fire",
    "shortuuid", "pillow", "pybase64", "openai", "openai_harmony", "partial_json_parser", "transformers>=4.56,<5",
    "einops", "safetensors", "sentencepiece", "tiktoken", "prometheus_client", "xgrammar", "cloudpickle", "psutil",
)  # fmt: skip


@contextmanager
def lmdeploy(cpu: int, folder: Path) -> Iterator[Proxy]:
    bin_ = installed(folder / "lmdeploy", *_LMDEPLOY)
    subprocess.run([bin_ / "pip", "install", "-q", "--no-deps", "lmdeploy==0.18.0"], check=True)
    port = free_port()
    argv = pinned(
        cpu, bin_ / "lmdeploy", "serve", "proxy", "--server-name", "127.0.0.1", "--server-port", port,
        "--serving-strategy", "DistServe", "--routing-strategy", "min_expected_latency", "--disable-cache-status",
    )  # fmt: skip
    with process("lmdeploy", argv, port, folder, ready=lambda: _lmdeploy_knows_its_engines(port)) as found:
        yield found


def _lmdeploy_knows_its_engines(port: int) -> None:
    """Register the engines; retried until the proxy listens."""
    deadline = time.monotonic() + 60
    roles = {PREFILL: 2, DECODE: 3}
    while roles:
        engine, role = next(iter(roles.items()))
        body = {"url": f"http://127.0.0.1:{engine}", "status": {"role": role, "models": ["mock"]}}
        try:
            httpx.post(f"http://127.0.0.1:{port}/nodes/add", json=body, timeout=5, trust_env=False).raise_for_status()
            del roles[engine]
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise SystemExit("LMDeploy's proxy does not listen; see its log") from None
            time.sleep(0.2)


@contextmanager
def pdctl(
    cpu: int,
    folder: Path,
    decodes: tuple[int, ...] = (DECODE,),
    more: str = "",
    cpus: tuple[int, ...] = (),
    name: str = "pdctl",
) -> Iterator[Proxy]:
    """pdctl with all features: metrics, failover, admission. `more`: keys of [proxy]; `cpus`: instead of one."""
    port = free_port()
    folder = folder / f"pdctl-{port}"
    folder.mkdir(parents=True, exist_ok=True)
    roles = {PREFILL: "prefill"} | dict.fromkeys(decodes, "decode")
    engines = "".join(
        f'[[engines]]\nname = "e{at}"\nrole = "{role}"\nkind = "vllm"\nurl = "http://127.0.0.1:{at}"\n'
        for at, role in roles.items()
    )
    text = f"""
[service]
name = "bench"
model = "mock"
[proxy]
port = {port}
cpus = {list(cpus or (cpu,))}
{more}
{engines}"""
    (folder / "pdctl.toml").write_text(text)
    env = {**os.environ, "PDCTL_RUN": str(folder / "r"), "PDCTL_STATE": str(folder / "s")}
    cli = [sys.executable, "-m", "pdctl"]
    subprocess.run([*cli, "up", "-d"], cwd=folder, env=env, check=True, capture_output=True)
    try:
        shown = subprocess.run([*cli, "status", "--json"], cwd=folder, env=env, check=True, capture_output=True)
        status = json.loads(shown.stdout)
        pid = next(process["pid"] for process in status["processes"] if process["name"].startswith("proxy"))
        await_port(port)
        yield Proxy(name, port, pid)
    finally:
        subprocess.run([*cli, "down"], cwd=folder, env=env, check=True, capture_output=True)


PEERS: dict[str, Callable[[int, Path], AbstractContextManager[Proxy]]] = {
    "pdctl": pdctl,
    "pdctl+takeover": partial(pdctl, more="takeover = true", name="pdctl+takeover"),
    "vllm-router": vllm_router,
    "sglang-router": sglang_router,
    "lmdeploy": lmdeploy,
}
