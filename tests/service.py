"""A real pdctl service for tests: started by the command line, called over HTTP, and checked to be gone afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from pdctl.control_api import SOCKET, ControlClient, LastExit, MeasuredProcess, MeasuredStatus, ProcessStatus
from pdctl.host.processes.stamps import stamped

REPOSITORY = Path(__file__).parent.parent
# The pdctl under test: this environment's, or a binary, whose engines run in this environment.
PROGRAM = os.path.abspath(os.environ["PDCTL_PROGRAM"]) if os.environ.get("PDCTL_PROGRAM") else ""  # noqa: PTH100
CLI = [PROGRAM] if PROGRAM else [sys.executable, "-m", "pdctl"]
SUPERVISOR = [PROGRAM or sys.executable, "-m", "pdctl.supervisor"]


@dataclass
class Run:
    """A separate directory for run files, state and topology. Model caches are shared."""

    folder: Path
    key: str = ""  # an API key of the service, if it has any
    poison: bool = True  # freed KV is filled with NaN; off for time measurements

    @property
    def env(self) -> dict[str, str]:
        extra = {
            "PDCTL_RUN": str(self.folder / "r"),
            "PDCTL_STATE": str(self.folder / "s"),
            "PDCTL_TRACE_DIR": str(self.folder / "trace"),
            "PDCTL_POISON_FREED": "1" if self.poison else "",
        }
        if PROGRAM:
            extra["PDCTL_PYTHON"] = sys.executable
        return {**os.environ, **extra}

    def cli(
        self, *words: str, timeout: float = 600, check: bool = False, extra: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*CLI, *words],
            env={**self.env, **(extra or {})},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        assert not check or done.returncode == 0, done.stderr + done.stdout
        return done

    def write(self, text: str, name: str = "pdctl.toml") -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def processes(self) -> list[psutil.Process]:
        """Every living process of this run, including the supervisor."""
        found = []
        for pid in stamped(f"PDCTL_RUN={self.folder / 'r'}"):
            with contextlib.suppress(psutil.NoSuchProcess):
                if pid != os.getpid():
                    found.append(psutil.Process(pid))
        return found


@contextmanager
def temporary_run() -> Iterator[Run]:
    """A directory for one service, removed at the end. A process that still runs then is killed and counts as a
    failure."""
    # Short, because a unix socket path is limited to 107 bytes and pytest's folders are long.
    made = Run(Path(tempfile.mkdtemp(prefix="pd-", dir="/tmp")))
    try:
        yield made
    finally:
        left = made.processes()
        for process in left:
            process.kill()
        shutil.rmtree(made.folder, ignore_errors=True)
    assert not left, f"left running: {left}"


class Service:
    """A running service."""

    def __init__(self, run: Run) -> None:
        self.run = run
        (run_dir,) = (path.parent for path in (run.folder / "r").glob(f"*/{SOCKET}"))
        self.control = ControlClient(run_dir)
        status = self.status()
        self.url, self.name = status.proxy_url, status.service
        self.client = httpx.Client(base_url=self.url, timeout=300, trust_env=False)

    def status(self) -> MeasuredStatus:
        """Asked of the supervisor itself: tests look many times a second, and each command costs as much as a second of
        an engine's start."""
        return self.control.status()

    def process(self, name: str) -> MeasuredProcess:
        return next(p for p in self.status().processes if p.name == name)

    def engines(self) -> list[MeasuredProcess]:
        return [p for p in self.status().processes if p.role not in ("proxy", "store")]

    def engine_state(self, name: str) -> dict[str, Any]:
        port = self.process(name).ports["http"]
        url = f"http://127.0.0.1:{port}/pdctl/v1/state"
        return dict(httpx.get(url, headers=self.internal, trust_env=False).json())

    @property
    def internal(self) -> dict[str, str]:
        """The authorization header of the service's own processes."""
        return {"authorization": f"Bearer {(self.run.folder / 'r' / self.name / 'secret').read_text()}"}

    def complete(self, prompt: str | list[int], **options: Any) -> dict[str, Any]:
        """An unstreamed answer's choice, with its usage."""
        body = {"prompt": prompt, "temperature": 0, "return_token_ids": True, **options}
        answer = self.client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        return {**found["choices"][0], "usage": found["usage"]}

    def stream(
        self, prompt: str | list[int], act: Callable[[], None] | None = None, at: int = 10, /, **options: Any
    ) -> dict[str, Any]:
        """The same answer, gathered from a stream. `act` is called once, when more than `at` tokens have come."""
        body = {"prompt": prompt, "temperature": 0, "return_token_ids": True, "stream": True, **options}
        text, ids, reason = "", [], None
        with self.client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            done = False
            for event in events(answer):
                if event is None:
                    done = True
                    continue
                assert "error" not in event, event
                for choice in event["choices"]:
                    text += choice["text"]
                    ids += choice["token_ids"]
                    reason = choice["finish_reason"] or reason
                if act is not None and len(ids) > at:
                    act()
                    act = None
            assert done, "no [DONE]"
            assert act is None, "the stream was too short"
        return {"text": text, "token_ids": ids, "finish_reason": reason}

    def wait(self, condition: Any, timeout: float = 300.0, what: str = "") -> Any:
        """Poll until `condition()` is true or the deadline has passed."""
        return wait_until(condition, timeout, what)

    def restarted(self, before: MeasuredProcess) -> MeasuredProcess:
        """Wait for the process that replaces `before` to be ready, and return it."""

        def back() -> MeasuredProcess | None:
            now = self.process(before.name)
            return now if now.state == "ready" and now.pid != before.pid else None

        found = self.wait(back, what=f"{before.name} to be restarted")
        assert isinstance(found, MeasuredProcess)
        return found

    def idle(self) -> None:
        """Wait until every engine has all its blocks free and no lease."""

        def all_idle() -> bool:
            try:
                states = [self.engine_state(p.name) for p in self.engines()]
            except httpx.TransportError:
                return False  # one is starting
            return all(s["blocks_free"] == s["blocks_total"] and not s["leases"] for s in states)

        self.wait(all_idle, what="idle block counts")

    def healthy(self) -> None:
        """Wait until every engine is available to the proxy."""

        def good() -> bool:
            try:
                answer = self.client.get("/health").json()
            except httpx.TransportError:
                return False
            return bool(answer["ok"]) and all(answer["engines"].values())

        self.wait(good, what="all engines healthy")


class Engine:
    """One engine of a service, called directly with the run's secret, like its peers."""

    def __init__(self, service: Service, name: str) -> None:
        process = service.process(name)
        self.name, self.epoch, self.pid = name, process.epoch, pid_of(process)
        secret = psutil.Process(self.pid).environ()["PDCTL_SECRET"]
        url = f"http://127.0.0.1:{process.ports['http']}"
        self.http = httpx.Client(
            base_url=url, trust_env=False, timeout=300, headers={"authorization": f"Bearer {secret}"}
        )

    @property
    def holder(self) -> str:
        return f"{self.name}@{self.epoch}"

    def hold(self, prompt: str, router: str = "router") -> dict[str, Any]:
        """Prefill and keep the KV; returns the hand-over."""
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 4, "kv_transfer_params": {"do_remote_decode": True}}
        answer = self.http.post("/v1/completions", json=body, headers={"x-pdctl-router": router})
        assert answer.status_code == 200, answer.text
        return dict(answer.json()["kv_transfer_params"])

    def decode(self, prompt: str, hand_over: object) -> httpx.Response:
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 4, "return_token_ids": True}
        return self.http.post("/v1/completions", json={**body, "kv_transfer_params": hand_over})

    def lease(self, verb: str, hand_over: dict[str, Any], holder: str, **changed: str) -> dict[str, Any]:
        call = {"lease_id": hand_over["lease_id"], "epoch": hand_over["epoch"], "holder": holder, **changed}
        return dict(self.http.post(f"/pdctl/v1/leases/{verb}", json=call).json())

    def state(self) -> dict[str, Any]:
        return dict(self.http.get("/pdctl/v1/state").json())


def pid_of(process: ProcessStatus) -> int:
    """Of one that runs."""
    assert process.pid is not None, f"{process.name} does not run"
    return process.pid


def last_exit_of(process: ProcessStatus) -> LastExit:
    """Of one that has ended before."""
    assert process.last_exit is not None, f"{process.name} never ended"
    return process.last_exit


def wait_until(condition: Any, timeout: float = 300.0, what: str = "") -> Any:
    deadline = time.monotonic() + timeout
    while True:
        if found := condition():
            return found
        assert time.monotonic() < deadline, f"not within {timeout} s: {what or condition}"
        time.sleep(0.05)


def events(answer: httpx.Response) -> Iterator[dict[str, Any] | None]:
    """A stream's events; None for [DONE]."""
    for line in answer.iter_lines():
        if line.startswith("data: "):
            yield None if line == "data: [DONE]" else json.loads(line[6:])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def topology(
    model: str = "sample:tiny-qwen3",
    prefills: int = 1,
    decodes: int = 1,
    hybrids: int = 0,
    extra: str = "",
    lease_s: float = 30,
    kv_cache_gb: float = 0.25,
    port: int | None = None,
    max_model_len: int = 2048,
    engine_extra: str = "",
    inline: bool = False,
) -> str:
    """A topology. `inline`: decode engines may take whole requests. By default all prompts go through a hand-over: most
    tests are about that."""
    engines = ""
    # Engines of other kinds take other keys.
    sizes = "" if "kind = " in engine_extra else f"max_num_seqs = 32\nkv_cache_gb = {kv_cache_gb}"
    sizes += "" if "kind = " in engine_extra else f"\ninline_prefill = {str(inline).lower()}"
    for role, count in (("prefill", prefills), ("decode", decodes), ("hybrid", hybrids)):
        if count:
            engines += f"""
[[engines]]
name = "{role}"
role = "{role}"
replicas = {count}
{sizes}
{engine_extra}
"""
    return f"""
[service]
name = "t"
model = "{model}"
served_model_name = "m"
max_model_len = {max_model_len}
[proxy]
port = {port or free_port()}
{extra}
[transfer]
lease_s = {lease_s}
[supervisor]
grace_s = 10
stable_s = 1
{engines}
"""


def single(**options: Any) -> str:
    """One hybrid engine, for faster starts in tests where the number of engines does not matter."""
    return topology(prefills=0, decodes=0, hybrids=1, **options)


@contextmanager
def running(run: Run, text: str) -> Iterator[Service]:
    """Start the service of a topology; afterwards stop it and check that nothing is left."""
    run.write(text)
    run.cli("up", "-d", check=True)
    service = Service(run)
    try:
        yield service
    finally:
        service.client.close()
        done = run.cli("down")
        left = run.processes()
        for process in left:
            process.kill()
        assert done.returncode == 0, done.stderr
        assert not left, f"left running: {[(p.pid, p.name()) for p in left]}"
        assert not (run.folder / "r" / "t").exists(), "the run directory is left"
        check_trace(run.folder / "trace")


def check_trace(folder: Path) -> None:
    from tests.trace_check import check

    check([json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()])
