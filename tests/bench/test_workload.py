"""Workloads, traces and arrivals."""

from __future__ import annotations

import itertools
import json
import random
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.bench import arrivals
from pdctl.bench.trace import Scale, read_trace
from pdctl.bench.workload import Vocabulary, from_file, lengths, shared_prefix, synthetic
from pdctl.errors import PdctlError

IDS = Vocabulary(tuple(range(100)))
RNG = random.Random


def test_lengths() -> None:
    rng = RNG(1)
    assert lengths("7", "x")(rng) == 7
    assert {lengths("3-5", "x")(rng) for _ in range(99)} == {3, 4, 5}
    normal = [lengths("normal:500:50", "x")(rng) for _ in range(500)]
    assert 480 < statistics.fmean(normal) < 520
    median = statistics.median(lengths("lognormal:500:0.8", "x")(rng) for _ in range(900))
    assert 420 < median < 590


@pytest.mark.parametrize("text", ["", "-3", "0", "9-3", "normal:0:1", "many", "lognormal:5", "5-", "99999999"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(PdctlError, match="--input"):
        lengths(text, "--input")


@given(st.integers(1, 40), st.integers(0, 99))
def test_the_same_seed_asks_the_same(count: int, seed: int) -> None:
    made = [synthetic(count, lengths("1-50", ""), lengths("1-9", ""), IDS, RNG(seed)) for _ in range(2)]
    assert made[0] == made[1]
    assert all(1 <= len(asked.prompt) <= 50 and 1 <= asked.max_tokens <= 9 for asked in made[0])


def test_shared_prefixes() -> None:
    made = shared_prefix(40, 3, 16, lengths("5", ""), lengths("1", ""), IDS, RNG(1))
    assert len({tuple(asked.prompt[:16]) for asked in made}) == 3
    assert {len(asked.prompt) for asked in made} == {21}
    words = shared_prefix(2, 1, 4, lengths("3", ""), lengths("1", ""), Vocabulary(), RNG(1))
    assert all(isinstance(asked.prompt, str) and len(asked.prompt.split()) == 7 for asked in words)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "hello", "max_tokens": 3}\n\n{"prompt": [1, 2]}\n')
    made = from_file(path, lengths("9", ""), RNG(1))
    assert [(asked.prompt, asked.max_tokens) for asked in made] == [("hello", 3), ([1, 2], 9)]
    path.write_text(
        '{"prompt": "x"}\nnot json\n{"prompt": ""}\n{"prompt": [1, "a"]}\n{"prompt": "x", "max_tokens": -1}\n[1]'
    )
    with pytest.raises(PdctlError, match="malformed lines 2, 3, 4, 5, 6") as caught:
        from_file(path, lengths("9", ""), RNG(1))
    assert caught.value.hint
    with pytest.raises(PdctlError, match="cannot be read"):
        from_file(tmp_path / "none", lengths("9", ""), RNG(1))


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,40,10\n2023-11-16 18:17:05.9799600,8,0\n"


def test_azure(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(AZURE)
    made = read_trace(path, Scale(speed=4, length=0.5), IDS, 1)
    assert [(asked.at, len(asked.prompt), asked.max_tokens) for asked in made] == [(0.0, 20, 5), (0.5, 4, 1)]
    assert len(read_trace(path, Scale(count=1), IDS, 1)) == 1
    assert len(read_trace(path, Scale(longest=20), IDS, 1)[0].prompt) == 10
    path.write_text(AZURE + "2023-11-16 18:17:05.9,-8,3\nyesterday,1,1\n1,2\n")
    with pytest.raises(PdctlError, match="malformed lines 4, 5, 6"):
        read_trace(path, Scale(), IDS, 1)


def test_mooncakes_blocks_are_shared_where_their_hashes_are(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [([0, 1, 2], 1500), ([0, 1, 3], 1100), ([9], 5)]
    path.write_text("".join(
        json.dumps({"timestamp": n * 1000, "input_length": size, "output_length": 9, "hash_ids": hashes}) + "\n"
        for n, (hashes, size) in enumerate(rows)
    ))  # fmt: skip
    first, second, third = read_trace(path, Scale(), IDS, 1)
    assert (len(first.prompt), len(second.prompt), len(third.prompt)) == (1500, 1100, 5)
    assert first.prompt[:1024] == second.prompt[:1024]
    assert first.prompt[1024:1100] != second.prompt[1024:1100]
    assert [asked.at for asked in (first, second, third)] == [0.0, 1.0, 2.0]
    short = read_trace(path, Scale(length=1 / 16), IDS, 1)
    assert len(short[0].prompt) == 94
    assert short[0].prompt[:64] == short[1].prompt[:64]
    path.write_text('{"timestamp": 0}\n')
    with pytest.raises(PdctlError, match="malformed line 1"):
        read_trace(path, Scale(), IDS, 1)


@given(st.integers(1, 300), st.floats(0.1, 1000), st.floats(0.1, 10))
def test_arrivals_keep_their_rate(count: int, rate: float, burstiness: float) -> None:
    times = arrivals.gamma(count, rate, burstiness, RNG(1))
    assert times == sorted(times)
    assert times[-1] == pytest.approx(count / rate)


def test_bursts_and_ramps() -> None:
    def spread(burstiness: float) -> float:
        times = arrivals.gamma(2000, 10, burstiness, RNG(1))
        gaps = [b - a for a, b in itertools.pairwise(times)]
        return statistics.pstdev(gaps) / statistics.fmean(gaps)

    assert spread(0.2) > 1.6
    assert 0.9 < spread(1.0) < 1.1
    assert spread(20) < 0.4
    times = arrivals.ramp(400, 1, 100, RNG(1))
    assert times[100] - times[0] > 4 * (times[399] - times[299])
    assert arrivals.gamma(3, float("inf"), 1, RNG(1)) == [0.0] * 3
    assert arrivals.scaled([5.0, 7.0], 2.0) == [0.0, 1.0]
