"""Two builtin engines in two hosts: KV crosses the network between them, and the tokens are those of one host."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.engine import Engine, start
from tests.hosts.lab import Host, Lab, lab, reason_to_skip
from tests.service import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())]

PROMPTS = ["Once upon a time there was a prompt of more than one block. " * times for times in (1, 4, 12)]


@pytest.fixture(scope="module")
def service() -> Iterator[Lab]:
    with lab("a", "b") as made:
        yield made


def handed_over(prefill: Engine, decode: Engine, prompt: str, seed: int | None) -> list[int]:
    """The answer's tokens: the first from one engine, the others from the other."""
    held = prefill.complete(prompt, seed, kv_transfer_params={"do_remote_decode": True})
    return decode.answer(prompt, seed, kv_transfer_params=held["kv_transfer_params"])


@pytest.mark.parametrize(("backend", "transport"), [("auto", "mooncake"), ("nixl", "nixl")])
def test_kv_crosses_hosts_and_tokens_are_those_of_one(
    service: Lab, tiny_model: Path, backend: str, transport: str
) -> None:
    words = ("--transfer", backend)
    prefill = start(service, "a", f"p-{backend}", tiny_model, *words)
    decode = start(service, "b", f"d-{backend}", tiny_model, *words)
    try:
        for engine in (prefill, decode):
            engine.until_ready()
        [link] = decode.link(prefill)
        assert (link["error"], link["protocol"], link["transport"]) == ("", "tcp", transport), link
        for prompt in PROMPTS:
            for seed in (None, 7):
                alone = prefill.answer(prompt, seed)
                assert handed_over(prefill, decode, prompt, seed) == alone
        [link] = decode.state()["links"]
        assert link["pulls"] >= len(PROMPTS)
        assert link["bytes"] > 0
        wait_until(lambda: not prefill.state()["leases"])
        # As docs/transports.md says.
        own, wild = service["a"].address, {"0.0.0.0", "::"}
        assert listening(service["a"]) == ({own} | wild if transport == "mooncake" else {own})
    finally:
        prefill.program.kill()
        decode.program.kill()


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
