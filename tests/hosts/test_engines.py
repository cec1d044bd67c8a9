"""Two builtin engines in two hosts: KV crosses the network between them, and the tokens are those of one host."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.hosts.lab import Host, Lab, Program, lab, reason_to_skip
from tests.hosts.node import Node
from tests.service import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())]

SECRET = "a secret of both engines"
PORT = 9000
PROMPTS = ["Once upon a time there was a prompt of more than one block. " * times for times in (1, 4, 12)]


@dataclass
class Engine:
    """One engine, called from beside the hosts as its peers call it."""

    lab: Lab
    host: Host
    name: str
    program: Program
    port: int = PORT

    def call(self, method: str, path: str, body: object = None, timeout: float = 120.0) -> Any:
        answer = self.lab.ask(partial(self._call, method, path, body, timeout))
        assert answer.status_code == 200, answer.text
        return answer.json()

    def _call(self, method: str, path: str, body: object, timeout: float) -> httpx.Response:
        url, headers = f"http://{self.host.address}:{self.port}{path}", {"authorization": f"Bearer {SECRET}"}
        with httpx.Client(trust_env=False, timeout=timeout) as http:
            return http.request(method, url, json=body, headers=headers)

    def until_ready(self) -> None:
        def is_ready() -> bool:
            try:
                return bool(self.lab.ask(partial(self._call, "GET", "/health", None, 5.0)).status_code == 200)
            except httpx.TransportError:
                assert self.program.is_running, (self.host.folder / f"{self.name}.log").read_text()[-2000:]
                return False

        wait_until(is_ready, what=f"{self.name} to be ready")

    def state(self) -> dict[str, Any]:
        return dict(self.call("GET", "/pdctl/v1/state"))

    def address(self) -> dict[str, Any]:
        return {"name": self.name, "host": self.host.address, "port": self.port, "epoch": self.state()["epoch"]}

    def link(self, *peers: Engine) -> list[dict[str, Any]]:
        return list(self.call("POST", "/pdctl/v1/links", {"peers": [peer.address() for peer in peers]})["links"])

    def complete(self, prompt: str, seed: int | None, **more: object) -> dict[str, Any]:
        sampling = {"temperature": 0} if seed is None else {"temperature": 0.9, "seed": seed}
        body = {"prompt": prompt, "max_tokens": 24, "ignore_eos": True, "return_token_ids": True, **sampling, **more}
        return dict(self.call("POST", "/v1/completions", body))

    def answer(self, prompt: str, seed: int | None, **more: object) -> list[int]:
        return list(self.complete(prompt, seed, **more)["choices"][0]["token_ids"])


def start(lab: Lab, where: str, name: str, model: Path, *words: str, port: int = PORT) -> Engine:
    node = Node(lab[where])
    argv = (
        "-m", "pdctl.engine", "serve", "--name", name, "--model", str(model), "--host", node.host.address, "--port",
        str(port), "--kv-cache-gb", "0.05", "--run-dir", str(node.folder / name), *words,
    )  # fmt: skip
    (node.folder / name).mkdir()
    program = node.python(*argv, log=f"{name}.log", env={"PDCTL_SECRET": SECRET, "OMP_NUM_THREADS": "1"})
    return Engine(lab, node.host, name, program, port)


@pytest.fixture(scope="module")
def service() -> Iterator[Lab]:
    with lab("a", "b") as made:
        yield made


def handed_over(prefill: Engine, decode: Engine, prompt: str, seed: int | None) -> list[int]:
    """The answer's tokens: the first from one engine, the others from the other."""
    held = prefill.complete(prompt, seed, kv_transfer_params={"do_remote_decode": True})
    return decode.answer(prompt, seed, kv_transfer_params=held["kv_transfer_params"])


@pytest.mark.parametrize("transport", ["mooncake", "nixl", "auto"])
def test_kv_crosses_hosts_and_tokens_are_those_of_one(service: Lab, tiny_model: Path, transport: str) -> None:
    words = ("--transfer", transport)
    prefill = start(service, "a", f"p-{transport}", tiny_model, *words)
    decode = start(service, "b", f"d-{transport}", tiny_model, *words)
    try:
        for engine in (prefill, decode):
            engine.until_ready()
        [link] = decode.link(prefill)
        assert (link["error"], link["protocol"]) == ("", "tcp"), link
        assert link["transport"] == {"auto": "mooncake"}.get(transport, transport)
        for prompt in PROMPTS:
            for seed in (None, 7):
                alone = prefill.answer(prompt, seed)
                assert handed_over(prefill, decode, prompt, seed) == alone
        [link] = decode.state()["links"]
        assert link["pulls"] >= len(PROMPTS)
        assert link["bytes"] > 0
        wait_until(lambda: not prefill.state()["leases"])
    finally:
        prefill.program.kill()
        decode.program.kill()


@pytest.mark.parametrize("transport", ["mooncake", "nixl"])
def test_what_listens_and_where(service: Lab, tiny_model: Path, transport: str) -> None:
    """docs/transports.md says so."""
    engine = start(service, "a", f"l-{transport}", tiny_model, "--transfer", transport)
    try:
        engine.until_ready()
        own, wild = service["a"].address, {"0.0.0.0", "::"}
        assert listening(service["a"]) == ({own} | wild if transport == "mooncake" else {own})
    finally:
        engine.program.kill()


def listening(host: Host) -> set[str]:
    """The addresses on which a host accepts connections."""
    found = set()
    for line in host.run(["cat", "/proc/net/tcp", "/proc/net/tcp6"]).stdout.splitlines():
        words = line.split()
        if words[3] == "0A":
            number = bytes.fromhex(words[1].partition(":")[0])
            words32 = [number[at : at + 4][::-1] for at in range(0, len(number), 4)]
            found.add(str(ipaddress.ip_address(b"".join(words32))))
    return found
