"""KV leases from an operator's view: lists, leaks, revocation, limit, links, transports."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.service import SUPERVISOR, Engine, Run, Service, pid_of, running, topology, wait_until

pytestmark = pytest.mark.e2e

LONG = "the quick brown fox jumps over the lazy dog " * 20  # 880 tokens of the tiny sample


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    with running(module_run, topology(lease_s=60, engine_extra="max_num_batched_tokens = 128")) as found:
        yield found


@pytest.fixture
def prefill(service: Service) -> Iterator[Engine]:
    service.healthy()
    engine = Engine(service, "prefill-0")
    with engine.http:
        yield engine
    service.idle()


@pytest.fixture
def decode(service: Service) -> Iterator[Engine]:
    engine = Engine(service, "decode-0")
    with engine.http:
        yield engine


def kv(service: Service, *words: str) -> dict[str, Any]:
    return dict(json.loads(service.run.cli("kv", "--json", *words, check=True).stdout))


def test_kv_lists_leases_and_their_end(service: Service, prefill: Engine, decode: Engine) -> None:
    hand_over = prefill.hold("hello there", router=decode.holder)
    found = kv(service)
    assert {e["name"] for e in found["engines"]} == {"prefill-0", "decode-0"}
    for engine in found["engines"]:
        parts = ("free", "referenced", "leased", "quarantined")
        assert sum(engine[f"blocks_{part}"] for part in parts) == engine["blocks_total"]
    (lease,) = found["leases"]
    assert lease["id"] == hand_over["lease_id"]
    assert lease["engine"] == "prefill-0"
    assert lease["holder"] == decode.holder
    assert (lease["state"], lease["blocks"], lease["leak"]) == ("held", 1, "")
    assert lease["bytes"] > 0
    assert lease["request_id"]
    assert 0 <= lease["age_s"] < 60
    assert hand_over["lease_id"] in service.run.cli("kv").stdout
    assert kv(service, "--leaks")["leases"] == [], "its holder lives"
    assert prefill.lease("release", hand_over, "router")["ok"]
    assert kv(service)["leases"] == []
    assert "no leases" in service.run.cli("kv").stdout


def test_a_lease_whose_holder_is_gone_is_a_leak_and_can_be_revoked(service: Service, prefill: Engine) -> None:
    hand_over = prefill.hold("hello there", router="proxy@of-another-life")
    (leak,) = kv(service, "--leaks")["leases"]
    assert (leak["id"], leak["leak"]) == (hand_over["lease_id"], "its holder is gone")
    assert "its holder is gone" in service.run.cli("kv", "--leaks").stdout
    done = service.run.cli("kv", "--revoke", hand_over["lease_id"])
    assert done.returncode == 0, done.stderr
    again = service.run.cli("kv", "--revoke", hand_over["lease_id"])
    assert again.returncode == 1
    assert "has ended: revoked" in again.stderr
    assert "no running engine granted" in service.run.cli("kv", "--revoke", "nonsense").stderr
    assert "no leaked leases" in service.run.cli("kv", "--leaks").stdout
    assert 'pdctl_engine_leases_ended_total{how="revoked"} 1.0' in prefill.http.get("/metrics").text


def test_every_wrong_call_is_refused_with_a_reason(service: Service, prefill: Engine, decode: Engine) -> None:
    hand_over = prefill.hold("hello there")
    unknown = prefill.lease("claim", hand_over, "d", lease_id="nonsense")
    assert unknown == {"ok": False, "reason": "unknown lease nonsense"}
    stale = prefill.lease("claim", hand_over, "d", epoch="old")
    assert not stale["ok"]
    assert "epoch old is over" in stale["reason"]
    assert "not claimed by d" in prefill.lease("commit", hand_over, "d")["reason"]
    assert prefill.lease("claim", hand_over, "d")["ok"]
    assert "is claimed by d" in prefill.lease("claim", hand_over, "e")["reason"]
    assert prefill.lease("commit", hand_over, "d")["ok"]
    assert prefill.lease("commit", hand_over, "d") == {"ok": True, "reason": "already committed"}
    assert not prefill.lease("commit", hand_over, "e")["ok"]
    assert not prefill.lease("claim", hand_over, "d")["ok"]
    with httpx.Client(base_url=prefill.http.base_url, trust_env=False) as stranger:
        for path in ("leases/revoke", "attempts/release", "holders/release", "offers", "links", "role"):
            assert stranger.post(f"/pdctl/v1/{path}", json={}).status_code == 401
        assert stranger.get("/pdctl/v1/endpoint").status_code == 401
    for body in (b"", b"{", b"[]", b'{"lease_id": 5}', b"\xff\xfe"):
        assert prefill.http.post("/pdctl/v1/leases/claim", content=body).status_code == 400
        assert decode.http.post("/pdctl/v1/offers", content=body).status_code == 400
    assert prefill.http.post("/pdctl/v1/leases/claim", content=b" " * (5 * 2**20)).status_code == 413


def test_hand_overs_of_the_wrong_shape_are_refused(service: Service, prefill: Engine, decode: Engine) -> None:
    good = prefill.hold("hello there")
    [pool] = good["endpoint"]["shards"]
    assert decode.decode("hello there", {**good, "remote_block_ids": list(range(10**5))}).status_code == 400
    assert decode.decode("hello there", {**good, "remote_block_ids": []}).status_code == 400
    # Two ranks that both have all heads.
    twice = decode.decode("hello there", {**prefill.hold("hello there"), "endpoint": {"shards": [pool, pool]}})
    assert twice.status_code == 409
    assert "the peer's KV has another shape than when it was linked" in twice.json()["error"]["message"]
    other = {**pool, "manifest": {**pool["manifest"], "dtype": "float16"}}
    refused = decode.decode("hello there", {**good, "remote_engine_id": "odd", "endpoint": {"shards": [other]}})
    assert refused.status_code == 409
    assert "KV is float16 there" in refused.json()["error"]["message"]
    spoiled = prefill.hold("hello there")
    nowhere = {"shards": [{**pool, "served": []}]}
    answer = decode.decode(
        "hello there", {**spoiled, "remote_engine_id": "odd", "epoch": spoiled["epoch"], "endpoint": nowhere}
    )
    assert "no transport is open on both sides" in answer.json()["error"]["message"]
    for changed in (
        {"remote_port": 70000}, {"remote_port": 0}, {"remote_num_tokens": -5}, {"lease_s": 0},
        {"first_token_id": 10**6}, {"first_token_id": -1},
    ):  # fmt: skip
        assert decode.decode("hello there", {**good, **changed}).status_code == 400, changed
    lost = decode.decode("hello there", {**good, "remote_host": "no\u0000host", "lease_id": "elsewhere"})
    assert lost.status_code == 409
    assert decode.http.post("/pdctl/v1/offers", json={"port": 70000}).status_code == 400
    for bad in (0, -1):
        strange = {"shards": [{**pool, "manifest": {**pool["manifest"], "block_size": bad}}]}
        assert decode.decode("hello there", {**good, "endpoint": strange}).status_code == 400
    assert decode.decode("hello there", prefill.hold("hello there")).status_code == 200, "nobody was harmed"


def test_a_dead_holders_leases_are_freed_by_witness(service: Service, prefill: Engine, decode: Engine) -> None:
    """SIGKILL of a decode engine with claimed leases: they end long before any deadline."""
    for number in range(4):
        assert prefill.lease("claim", prefill.hold(f"hello {number}"), decode.holder)["ok"]
    assert len(prefill.state()["leases"]) == 4
    before = service.process("decode-0")
    os.kill(decode.pid, signal.SIGKILL)
    wait_until(lambda: not prefill.state()["leases"], what="the leases to end")
    metrics = prefill.http.get("/metrics").text
    assert 'pdctl_engine_leases_ended_total{how="holder_died"} 4.0' in metrics
    assert 'pdctl_engine_block_seconds_total{what="leaked"}' in metrics
    service.restarted(before)
    service.healthy()


def test_a_dead_proxys_leases_are_freed_by_witness(service: Service, prefill: Engine) -> None:
    def died() -> int:
        found = re.search(r'leases_ended_total{how="holder_died"} (\d+)', prefill.http.get("/metrics").text)
        return int(found[1]) if found else 0

    proxy = service.process("proxy")
    before = died()
    prefill.hold("hello there", router=f"proxy@{proxy.epoch}")
    assert len(prefill.state()["leases"]) == 1
    os.kill(pid_of(proxy), signal.SIGKILL)
    wait_until(lambda: not prefill.state()["leases"], what="the lease to end")
    assert died() == before + 1
    service.restarted(proxy)
    service.healthy()


def test_long_prompts_are_read_chunk_by_chunk(service: Service, prefill: Engine, decode: Engine) -> None:
    before = decode.state()["transfers"]
    # Each under a salt of its own: nothing of the prompt is there already.
    answers = [
        service.complete(LONG, max_tokens=12, ignore_eos=True, cache_salt=str(number))["token_ids"]
        for number in range(3)
    ]
    after = decode.state()["transfers"]
    assert answers[0] == answers[1] == answers[2]
    assert after["early"] - before["early"] == 3
    assert after["pulls"] - before["pulls"] > 2 * 3, "several pulls a hand-over"
    assert after["lost"] == before["lost"]


def test_status_shows_how_kv_moves(service: Service) -> None:
    service.complete("hello", max_tokens=4)
    (link,) = service.status().links
    assert (link.reader, link.peer, link.transport, link.fallback) == ("decode-0", "prefill-0", "shm", "")
    assert link.pulls > 0
    assert link.gbps > 0
    assert "this host" in link.reason
    assert "shm" in service.run.cli("status").stdout


def test_engines_learn_their_role_from_the_supervisor(service: Service, prefill: Engine, decode: Engine) -> None:
    for engine, role in ((prefill, "prefill"), (decode, "decode")):
        assert "--role" not in psutil.Process(engine.pid).cmdline(), "the supervisor tells it"
        assert engine.http.post("/pdctl/v1/role", json={"role": "nonsense"}).status_code == 400
        assert engine.state()["role"] == role
    assert decode.http.post("/pdctl/v1/role", json={"role": "hybrid"}).json() == {"role": "hybrid", "epoch": 0}
    assert decode.state()["role"] == "hybrid"
    assert decode.http.post("/pdctl/v1/role", json={"role": "decode"}).status_code == 200


def test_a_restarted_engine_is_linked_again(service: Service) -> None:
    before = service.process("prefill-0")
    os.kill(pid_of(before), signal.SIGKILL)
    service.restarted(before)

    def linked() -> bool:
        (link,) = service.status().links
        return bool(link.epoch == service.process("prefill-0").epoch and link.transport == "shm")

    wait_until(linked, what="the new link")
    assert service.engine_state("prefill-0")["role"] == "prefill", "told again"
    assert service.process("prefill-0").epoch != before.epoch


# -- services of their own ---------------------------------------------------------------------------------


def test_prefill_waits_at_the_ceiling_instead_of_filling_up(run: Run) -> None:
    text = topology(kv_cache_gb=0.004, lease_s=600).replace("[transfer]", "[transfer]\nleased_max = 0.2")
    with running(run, text) as service:
        prefill = Engine(service, "prefill-0")
        total = prefill.state()["blocks_total"]
        held = [prefill.hold("one hundred is the number of this prompt, hello")]
        size = prefill.state()["blocks_leased"]
        fit = int(0.2 * total) // size
        held += [prefill.hold(f"{100 + n} is the number of this prompt, hello") for n in range(1, fit)]
        got: list[dict[str, Any]] = []
        late = threading.Thread(target=lambda: got.append(prefill.hold("five 00 is the number of this prompt, hello")))
        late.start()
        wait_until(lambda: prefill.state()["held_back"] == 1, what="back-pressure")
        assert prefill.state()["blocks_leased"] <= 0.2 * total
        assert not got
        assert run.cli("kv", "--revoke", held[0]["lease_id"]).returncode == 0
        late.join(30)
        assert got, "a lease that ended lets the next prefill in"
        for hand_over in [*held[1:], *got]:
            assert prefill.lease("release", hand_over, "router")["ok"]
        prefill.http.close()
        service.idle()


@pytest.fixture(scope="module")
def expected(service: Service) -> list[int]:
    """The answers with shared memory: the reference for other transports."""
    return list(service.complete(LONG, max_tokens=24, ignore_eos=True)["token_ids"])


@pytest.mark.parametrize("backend", ["mooncake", pytest.param("nixl", marks=pytest.mark.slow)])
def test_network_transports_carry_the_same_tokens(run: Run, expected: list[int], backend: str) -> None:
    """RDMA is required but not available: the fallback is reported, and the tokens are the same."""
    told = run.cli("doctor", "transfer", "--transport", backend, "--mib", "1", "--json").stdout
    (able,) = json.loads(told)["transfer"]
    if "error" in able:
        pytest.skip(f"NOT TESTED: {able['error']}")
    text = topology(engine_extra="max_num_batched_tokens = 128")
    text = text.replace("[transfer]", f'[transfer]\nbackend = "{backend}"\nprotocol = "rdma"')
    with running(run, text) as service:
        assert service.complete(LONG, max_tokens=24, ignore_eos=True)["token_ids"] == expected
        (link,) = service.status().links
        assert (link.transport, link.protocol) == (backend, "tcp")
        assert "RDMA is configured" in link.fallback
        assert "FALLBACK" in run.cli("status").stdout
        for number in range(1, 20):
            (link,) = service.status().links
            if link.pulls > number:
                break
            # Another prompt: the number of chunks per read depends on the speed.
            service.complete(f"{number:02} {LONG[3:]}", max_tokens=2, ignore_eos=True)
        assert link.pulls >= 2, "chunk by chunk here too"
        assert link.pulls > number, "more reads than requests"
        service.idle()


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [pytest.param(16, 32, marks=pytest.mark.slow), pytest.param(32, 16, marks=pytest.mark.slow), (5, 7)],
)
def test_block_sizes_may_differ(run: Run, expected: list[int], prefill: int, decode: int) -> None:
    text = topology(engine_extra="max_num_batched_tokens = 128")
    first, second = text.split('name = "decode"')
    text = f'{first}block_size = {prefill}\n[[engines]]\nname = "decode"{second}block_size = {decode}\n'
    text = text.replace("[[engines]]\n" + f"block_size = {prefill}\n", f"block_size = {prefill}\n")
    with running(run, text) as service:
        assert service.complete(LONG, max_tokens=24, ignore_eos=True)["token_ids"] == expected
        service.idle()


@pytest.mark.slow
def test_without_chunks_the_tokens_are_the_same(run: Run, expected: list[int]) -> None:
    text = topology(engine_extra="max_num_batched_tokens = 128").replace("[transfer]", "[transfer]\nchunked = false")
    with running(run, text) as service:
        assert service.complete(LONG, max_tokens=24, ignore_eos=True)["token_ids"] == expected
        assert service.engine_state("decode-0")["transfers"]["early"] == 0


def test_pools_that_do_not_fit_are_refused_at_start(run: Run, tiny_model: Path) -> None:
    """Decode gets other weights under the same name: refused before any request."""
    from safetensors.torch import load_file, save_file

    other = run.folder / "other"
    shutil.copytree(tiny_model, other)
    weights = load_file(other / "model.safetensors")
    first = sorted(weights)[0]
    weights[first] = weights[first] + 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    run.write(topology())
    plan = json.loads(run.cli("plan", "--json", check=True).stdout)
    for process in plan["processes"]:
        if process["name"] == "decode-0":
            process["argv"] = [str(other) if word == str(tiny_model) else word for word in process["argv"]]
    done = subprocess.run(
        SUPERVISOR, input=json.dumps(plan), env=run.env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert "decode-0 cannot use the KV of prefill-0: its KV does not fit: the models differ" in done.stderr
    assert run.processes() == []
