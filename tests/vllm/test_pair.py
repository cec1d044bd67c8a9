"""One prefill and one decode engine of vLLM: answers, commands, changes."""

from __future__ import annotations

import json
import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from pdctl.adapters.vllm.log import PHASES
from pdctl.supervisor.process.shared_memory import mapped
from tests.service import Service, pid_of
from tests.vllm.conftest import LEASE_S, Direct, left_of, topology, tree_of

PROMPTS = int(os.environ.get("PDCTL_VLLM_PROMPTS", "200"))
WORDS = "the quick brown fox jumps over a lazy dog while engines hand their caches on all day long".split()  # noqa: SIM905


def prompts(count: int, seed: int = 1) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 100))) for _ in range(count)]


def events_of(service: Service) -> list[dict[str, object]]:
    done = service.run.cli("events", "-s", "t", check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_greedy_answers_are_those_of_one_vllm(service: Service) -> None:
    asked = prompts(PROMPTS)
    with Direct(service, "decode-0") as alone, ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda prompt: service.complete(prompt, max_tokens=24)["token_ids"], asked))
        assert found == [alone.complete(prompt, max_tokens=24) for prompt in asked]
        metrics = alone.http.get("/metrics").text
    pulled = next(line for line in metrics.splitlines() if line.startswith("vllm:nixl_xfer_time_seconds_count"))
    # On an overloaded machine some requests are computed by one engine alone.
    assert float(pulled.rsplit(" ", 1)[1]) >= PROMPTS / 2, "the KV came from the prefill engine"


def test_streams_chats_and_several_choices(service: Service) -> None:
    [prompt] = prompts(1, seed=2)
    whole = service.complete(prompt, max_tokens=40)
    assert service.stream(prompt, max_tokens=40)["token_ids"] == whole["token_ids"]
    two = service.client.post(
        "/v1/completions", json={"prompt": [prompt, "hello"], "n": 2, "max_tokens": 4, "temperature": 0}
    )
    assert len(two.json()["choices"]) == 4
    message = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
    answer = service.client.post("/v1/chat/completions", json=message).json()
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] <= 8


def test_commands_know_these_engines(service: Service) -> None:
    status = {process.name: process for process in service.status().processes}
    assert {process.state for process in status.values()} == {"ready"}
    assert set(status["decode-0"].ports) == {"http", "side-channel"}
    service.complete("hello", max_tokens=2)
    assert status["decode-0"].running == 0
    [prefill, decode] = service.control.leases().engines
    assert prefill.blocks_total > 0
    assert "expired_leases" in decode.counters
    known = [phase for _, phase in PHASES]
    phases = [str(e["message"]) for e in events_of(service) if e["event"] == "phase" and e["process"] == "decode-0"]
    # A phase that takes less than half a second may be missed.
    assert len(phases) >= 3
    assert phases == sorted(phases, key=known.index)
    checked = service.run.cli("doctor", "--json", extra={"PDCTL_FILE": str(service.run.folder / "pdctl.toml")})
    assert checked.returncode in (0, 1), checked.stderr
    bench = service.run.cli(
        "bench",
        "serve",
        service.url,
        "--requests",
        "8",
        "--concurrency",
        "2",
        "--input",
        "32",
        "--output",
        "8",
        "--json",
    )
    assert bench.returncode == 0, bench.stderr


def test_a_stream_goes_on_when_its_decode_engine_is_killed(service: Service) -> None:
    """The prefill engine computes the rest alone until decode is back, and the exit is explained."""
    [prompt] = prompts(1, seed=3)
    quiet, before = service.stream(prompt, max_tokens=300), service.process("decode-0")
    tree = tree_of(service, "decode-0")
    used = mapped(tree)
    assert len(tree) > 1, "vLLM's engine core is a process of its own"
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(lambda: service.stream(prompt, max_tokens=300))
        service.wait(lambda: service.process("decode-0").running, what="the stream to decode")
        os.kill(pid_of(before), signal.SIGKILL)
        assert found.result() == quiet
    after = service.restarted(before)
    assert after.last_exit is not None
    assert after.last_exit.signal == "SIGKILL"
    assert "SIGKILL" in service.run.cli("why", "decode-0", "-s", "t", check=True).stdout
    assert not set(tree) & {process.pid for process in service.run.processes()}, "the whole tree is gone"
    assert not left_of(used), "what the killed engine left was removed"


def test_a_late_pull_is_never_decoded(service: Service) -> None:
    """A decode engine that is frozen for longer than the lease would read blocks that hold other KV by then."""

    def answer(prompt: str) -> list[int]:
        return list(service.complete(prompt, max_tokens=24)["token_ids"])

    asked = prompts(6, seed=4)
    quiet = {prompt: answer(prompt) for prompt in asked}
    pids = tree_of(service, "decode-0")
    with ThreadPoolExecutor(6) as pool:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        found = {prompt: pool.submit(answer, prompt) for prompt in asked}
        # Other prompts take the blocks of the leases that end.
        for prompt in prompts(4, seed=5):
            service.complete(prompt, max_tokens=4)
        service.wait(lambda: all(future.done() for future in found.values()), timeout=3 * LEASE_S + 120, what="answers")
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert {prompt: future.result() for prompt, future in found.items()} == quiet


def test_a_changed_option_is_applied_by_a_drained_restart(service: Service) -> None:
    port = int(service.url.rsplit(":", 1)[1])
    before = service.process("decode-0")
    service.run.write(topology(1, 1, port=port, decode_args='"--enforce-eager", "--seed", "7"'))
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(lambda: service.stream("hello there", max_tokens=200))
        done = service.run.cli("apply", "-f", str(service.run.folder / "pdctl.toml"), timeout=900)
        assert done.returncode == 0, done.stderr
        assert found.result()["finish_reason"] == "length"
    after = service.process("decode-0")
    assert (after.state, after.pid == before.pid) == ("ready", False)
    assert service.complete("hello", max_tokens=4)["usage"]["completion_tokens"] == 4


def test_a_wrong_option_ends_in_one_sentence(service: Service) -> None:
    """In a service of its own: an option that vLLM does not know, and one that pdctl sets."""
    text = topology(1, 1, decode_args='"--no-such-option"').replace('name = "t"', 'name = "wrong"')
    path = service.run.write(text, "wrong.toml")
    done = service.run.cli("up", "-d", "-f", str(path), timeout=900)
    assert done.returncode != 0
    assert "vLLM does not know the option --no-such-option" in done.stdout + done.stderr
    ours = service.run.write(text.replace("--no-such-option", "--port"), "ours.toml")
    refused = service.run.cli("plan", "-f", str(ours))
    assert refused.returncode == 1
    assert "--port is set by pdctl" in refused.stderr
    both = text.replace('"--no-such-option"', "").replace(
        "kv_cache_gb = 1", 'kv_cache_gb = 1\nenv = { VLLM_NIXL_SIDE_CHANNEL_PORT = "5600" }'
    )
    refused = service.run.cli("plan", "-f", str(service.run.write(both, "both.toml")))
    assert refused.returncode == 1
    assert "VLLM_NIXL_SIDE_CHANNEL_PORT is set by pdctl" in refused.stderr


@pytest.mark.parametrize("field", [{"logprobs": 2}, {"presence_penalty": 0.5}])
def test_what_cannot_go_on_exactly_is_answered_while_nothing_fails(service: Service, field: dict[str, object]) -> None:
    assert service.complete("hello", max_tokens=4, **field)["usage"]["completion_tokens"] == 4
