"""Builtin engines by hand in hosts, called as their peers call them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from tests.hosts.lab import Host, Lab, Program
from tests.hosts.node import Node
from tests.service import wait_until

SECRET = "a secret of both engines"
PORT = 9000


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

    def tokens(self, body: dict[str, Any]) -> list[int]:
        """The answer to a request, which is made whole."""
        return list(self.call("POST", "/v1/completions", {**body, "stream": False})["choices"][0]["token_ids"])

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
