"""Prompts with the same beginning, over real engines: less is computed and moved, and the tokens stay the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.service import Engine, Run, Service, pid_of, running, temporary_run, topology

pytestmark = pytest.mark.e2e

MOVED = "pdctl_engine_pulled_bytes_total"
HITS = "pdctl_engine_prefix_hits_total"


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    with running(module_run, topology()) as found:
        yield found


def metric(service: Service, engine: str, name: str) -> float:
    with Engine(service, engine).http as http:
        lines = http.get("/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.split()[0] == name))


def tokens(number: int, count: int) -> list[int]:
    """Prompts with different numbers begin differently."""
    return [5 + (31 * number + 7 * index) % 370 for index in range(count)]


def cached(answer: dict[str, Any]) -> int:
    return int(answer["usage"].get("prompt_tokens_details", {}).get("cached_tokens", 0))


def test_a_conversation_computes_and_moves_only_what_is_new(service: Service) -> None:
    history = tokens(1, 100)
    for turn in range(5):
        moved = metric(service, "decode-0", MOVED)
        answer = service.complete(history, max_tokens=20, ignore_eos=True, cache_salt="one")
        middle = metric(service, "decode-0", MOVED)
        anew = service.complete(history, max_tokens=20, ignore_eos=True, cache_salt=f"anew {turn}")
        assert answer["token_ids"] == anew["token_ids"], "a hit has changed a token"
        assert cached(anew) == 0, "salts share KV"
        if turn:
            assert cached(answer) >= len(history) - 20 - 10 - 32, "the prefill engine has the last turn's prompt"
            assert middle - moved < 0.5 * (metric(service, "decode-0", MOVED) - middle), "decode has the last turn"
        history += [*answer["token_ids"], *tokens(2 + turn, 10)]
    service.idle()


def test_the_same_prompt_again_moves_nothing(service: Service) -> None:
    prompt = tokens(11, 128)  # 8 blocks
    first = service.complete(prompt, max_tokens=4)
    before = metric(service, "decode-0", MOVED)
    again = service.complete(prompt, max_tokens=4)
    assert again["token_ids"] == first["token_ids"]
    assert cached(again) == 112, "all full blocks but the one of the last token"
    assert metric(service, "decode-0", MOVED) == before
    service.idle()


def test_a_long_prompt_is_read_in_chunks_without_what_decode_has(service: Service) -> None:
    begin, more = tokens(21, 400), tokens(22, 1200)
    answer = service.complete(begin, max_tokens=120, ignore_eos=True)["token_ids"]
    early, before = (metric(service, "decode-0", name) for name in ("pdctl_engine_pulls_early_total", MOVED))
    prompt = [*begin, *answer, *more]
    found = service.complete(prompt, max_tokens=20, ignore_eos=True)
    moved = metric(service, "decode-0", MOVED) - before
    anew = service.complete(prompt, max_tokens=20, ignore_eos=True, cache_salt="anew")
    assert found["token_ids"] == anew["token_ids"]
    whole = metric(service, "decode-0", MOVED) - before - moved
    assert metric(service, "decode-0", "pdctl_engine_pulls_early_total") == early + 2, "both were read in chunks"
    # Of 1,720 tokens decode has 519: the prompt and its own answer, without the answer's last token.
    assert moved / whole == pytest.approx((1720 - 512) / 1720, abs=0.001)
    service.idle()


def test_a_stream_counts_cached_tokens_too(service: Service) -> None:
    prompt = tokens(12, 100)
    service.complete(prompt, max_tokens=2)
    body = {"prompt": prompt, "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}, "model": "m"}
    text = service.client.post("/v1/completions", json=body).text
    assert '"cached_tokens":96' in text


def test_the_prefill_after_a_failover_finds_the_first_one(service: Service) -> None:
    prompt = tokens(13, 160)
    expected = service.complete(prompt, max_tokens=300, ignore_eos=True, cache_salt="other")["token_ids"]
    before = service.process("decode-0")
    hits: list[float] = []

    def kill_core() -> None:
        hits.append(metric(service, "prefill-0", HITS))
        for core in psutil.Process(pid_of(before)).children():
            core.kill()

    assert service.stream(prompt, kill_core, max_tokens=300, ignore_eos=True)["token_ids"] == expected
    assert metric(service, "prefill-0", HITS) >= hits[0] + 160, "the whole prompt was there"
    service.restarted(before)
    service.idle()


def test_status_and_kv_show_it(service: Service) -> None:
    text = service.run.cli("kv", check=True).stdout
    assert "prefix hits" in text
    prefill = service.process("prefill-0")
    assert prefill.prefix_hit_rate is not None
    assert 0.2 < prefill.prefix_hit_rate < 0.9
    assert "HITS" in service.run.cli("status", check=True).stdout


def test_deterministic_engines_find_whole_segments_on_both_sides() -> None:
    with temporary_run() as run, running(run, topology(engine_extra="deterministic = true")) as service:
        prompt = tokens(31, 300)
        first = service.complete(prompt, max_tokens=8, logprobs=3)
        before = metric(service, "decode-0", MOVED)
        again = service.complete(prompt, max_tokens=8, logprobs=3)
        assert cached(first) == 0
        assert cached(again) == 256
        assert again["logprobs"] == first["logprobs"], "to the last digit"
        assert again["token_ids"] == first["token_ids"]
        # Decode keeps what prefill has computed in whole segments, and reads the other 44 tokens.
        assert metric(service, "decode-0", MOVED) - before == pytest.approx(before * 44 / 300)
        service.idle()
