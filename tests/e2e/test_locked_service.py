"""Every verb on a secured service: TLS, API keys, the IPv6 loopback address, two workers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import httpx
import pytest

from tests.service import Run, Service, free_port, running, topology

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    folder = module_run.folder
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=example.org"]
    subprocess.run([*words, "-keyout", folder / "k.pem", "-out", folder / "c.pem"], check=True, capture_output=True)
    made = module_run.cli("key", "me", "--file", str(folder / "keys.txt"), check=True)
    module_run.key = made.stdout.split()[0]
    proxy = 'host = "::1"\nworkers = 2\napi_keys = "keys.txt"\ntls_cert = "c.pem"\ntls_key = "k.pem"\ntakeover = true'
    text = topology(model="sample:tiny-chat", extra=proxy, port=free_port())
    with running(module_run, text) as found:
        yield found


def verb(service: Service, *words: str) -> subprocess.CompletedProcess[str]:
    done = service.run.cli(*words, extra={"PDCTL_API_KEY": service.run.key})
    assert done.returncode == 0, done.stderr + done.stdout
    return done


SERVE = ("bench", "serve", "-n", "4", "--input", "16", "--output", "4", "--warm-up", "1")


def test_it_is_locked(service: Service) -> None:
    assert service.url.startswith("https://[::1]:")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{service.url}/v1/models", trust_env=False)
    assert service.run.cli("ask", "x").returncode == 1, "without a key"


def test_connections_that_takeover_cannot_cover_are_counted(service: Service) -> None:
    headers = {"authorization": f"Bearer {service.run.key}"}
    text = httpx.get(f"{service.url}/metrics", trust_env=False, verify=False, headers=headers).text
    counts = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if "_connections_total{" in line}
    assert counts['pdctl_proxy_connections_total{cover="uncovered"}'] > 0
    assert counts['pdctl_proxy_connections_total{cover="covered"}'] == 0


@pytest.mark.parametrize("more", [(), ("--chat",), ("--workload", "shared-prefix")])
def test_bench_serve(service: Service, more: tuple[str, ...]) -> None:
    found = json.loads(verb(service, *SERVE, *more, "--json").stdout)
    assert (found["completed"], found["failed"]) == (4, 0)


def test_bench_serve_by_address(service: Service) -> None:
    for address in (service.url, f"{service.url}/v1", f"{service.url}/v1/"):
        assert json.loads(verb(service, *SERVE, address, "--json").stdout)["completed"] == 4


def test_bench_without_a_key_says_so(service: Service) -> None:
    done = service.run.cli(*SERVE)
    assert done.returncode == 1
    assert "unexpected" not in done.stderr


def test_the_other_bench_verbs(service: Service) -> None:
    missed = service.run.cli(
        "bench", "sweep", "--rate", "200", "--seconds", "1", "--input", "16", "--output", "2", "--goodput", "ttft:0.01",
        extra={"PDCTL_API_KEY": service.run.key},
    )  # fmt: skip
    rates = [line for line in missed.stderr.splitlines() if "met their targets, 0 failed" in line]
    assert len(rates) == 7, missed.stderr
    assert "at no rate did 90% meet their targets" in missed.stderr
    verb(service, "bench", "chaos", "--for", "3", "--every", "2", "--streams", "2", "--prompts", "2", "--input", "16",
         "--output", "8", "--fault", "kill:decode")  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [("status",), ("status", "--json"), ("kv",), ("events",), ("why", "decode-0"), ("logs",), ("plan",),
     ("ask", "hello"), ("apply", "--dry-run"), ("restart", "decode-0", "--drain"), ("doctor", "topology")],
    ids=" ".join,
)  # fmt: skip
def test_the_other_verbs(service: Service, words: tuple[str, ...]) -> None:
    verb(service, *words)
