"""pdctl's /nodes endpoints and LMDeploy 0.18: its own classes, its own answers, and its own code as the caller.

See test_schemas.py for PDCTL_LMDEPLOY_PYTHON. LMDeploy's registration runs from its source in this environment, which
has `requests`, against a running service.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import httpx
import msgspec
import pytest

from pdctl.adapters.lmdeploy import nodes
from tests.adapters.lmdeploy.test_schemas import PYTHON, lmdeploys_folder, refusals
from tests.service import Run, Service, free_port, running, temporary_run

pytestmark = pytest.mark.skipif(not PYTHON, reason="PDCTL_LMDEPLOY_PYTHON is not set: run scripts/lmdeploy-schemas DIR")
KEY = "a key/with:signs"

BODIES = (
    {"url": "http://10.0.0.7:23333", "status": {"models": ["m", "lora"], "role": 2}},
    {"url": "http://10.0.0.7:23333", "status": {"models": ["m"], "role": 3, "speed": "5", "latency": [0.5]}},
    {"url": "http://10.0.0.7:23333", "status": None},
    {"url": "http://10.0.0.7:23333", "status": {}},
    {"url": "http://10.0.0.7:23333"},
)
WRONG = (
    {"status": {"models": ["m"]}},
    {"url": 5},
    {"url": "u", "status": {"models": "m"}},
    {"url": "u", "status": {"role": "Decode"}},
    {"url": "u", "status": {"speed": "fast"}},
)


def test_what_lmdeploy_takes_for_a_registration_pdctl_takes() -> None:
    assert refusals(*(("Node", body) for body in BODIES)) == [""] * len(BODIES)
    for body in BODIES:
        assert nodes.decode_registration(msgspec.json.encode(body)).url == body["url"]


def test_what_lmdeploy_refuses_pdctl_refuses() -> None:
    assert all(refusals(*(("Node", body) for body in WRONG)))
    for body in WRONG:
        with pytest.raises(msgspec.ValidationError):
            nodes.decode_registration(msgspec.json.encode(body))


def test_a_status_is_lmdeploys() -> None:
    shown = [nodes.Status(number, ("m",), 2, (0.5, 0.25), speed) for number, speed in ((1, None), (2, 3), (3, None))]
    bodies = [json.loads(msgspec.json.encode(one)) for one in shown]
    assert refusals(*(("Status", body) for body in bodies)) == [""] * 3
    assert refusals(("Status", bodies[0] | {"role": 4}))[0]


def test_answers_are_lmdeploys() -> None:
    source = (lmdeploys_folder() / "serve" / "proxy" / "proxy.py").read_text()
    for answer in (nodes.ADDED, nodes.DELETED, nodes.TERMINATED, nodes.ALL_TERMINATED):
        assert f"return '{answer}'" in source


def register(service: Service, key: str, model: str, url: str = "http://127.0.0.1:9", role: int = 3) -> str:
    """What LMDeploy logs when it registers an engine."""
    pytest.importorskip("requests")
    asked = {"proxy_url": service.url.replace("//", f"//node:{key}@"), "api_server_url": url, "model_name": model}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "registration.py"), str(lmdeploys_folder())],
        input=json.dumps({**asked, "role": role}), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def service_text(run: Run) -> str:
    (run.folder / "nodes.keys").write_text(f"node sha256:{hashlib.sha256(KEY.encode()).hexdigest()}\n")
    proxy = f'[proxy]\nport = {free_port()}\naccept_nodes = true\nnode_keys = "nodes.keys"\n'
    return f'[service]\nname = "t"\nmodel = "m"\n{proxy}'


@pytest.mark.e2e
def test_lmdeploys_own_code_registers_an_engine() -> None:
    with temporary_run() as run, running(run, service_text(run)) as service:
        encoded = httpx.URL("http://h").copy_with(username="node", password=KEY).userinfo.decode().partition(":")[2]
        assert register(service, encoded, "m") == ""
        found = httpx.get(f"{service.url}/nodes/status", auth=("node", KEY), trust_env=False).json()
        assert found == {
            "http://127.0.0.1:9": {"role": 3, "models": ["m", "lora"], "unfinished": 0, "latency": [], "speed": None}
        }
        # As it listens on all addresses by default, it registers this one.
        assert register(service, encoded, "m", "http://0.0.0.0:10") == ""
        assert (
            "http://127.0.0.1:10"
            in httpx.get(f"{service.url}/nodes/status", auth=("node", KEY), trust_env=False).json()
        )
        assert "Service registration failed: 401" in register(service, "wrong", "m")
        assert "serves other, lora, and this service m" in register(service, encoded, "other")
