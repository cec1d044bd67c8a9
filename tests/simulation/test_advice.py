"""Advice: the verdict follows from the load, and the interval from its noise."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from pdctl.bench.measurements import Targets
from pdctl.latency import StepTimes
from pdctl.simulation.advice import CHUNKS, Advice, Outcome, Setup, advise, outcome, setups
from pdctl.simulation.spec import Arrival, EngineSpec, ServiceSpec, TransferSpec

TIMES = StepTimes((0.01, 0.0002, 0.0, 0.0005, 0.0))
LIKE = EngineSpec("e", "hybrid", TIMES, 4000)
BASE = ServiceSpec((LIKE, LIKE), ttft_s=1.0, tpot_s=0.03)
TARGETS = Targets(1000.0, 30.0)


def load(rate: float, inputs: int, outputs: int, count: int = 150, seed: int = 1) -> list[Arrival]:
    rng, at, found = random.Random(seed), 0.0, []
    for _ in range(count):
        at += rng.expovariate(rate)
        found.append(Arrival(at, rng.randint(inputs // 2, inputs), rng.randint(1, outputs)))
    return found


def advice(rate: float, inputs: int, outputs: int, base: ServiceSpec = BASE, engines: int = 2) -> Advice:
    return advise(base, engines, [load(rate, inputs, outputs, 60, seed) for seed in range(2)], TARGETS)


def test_long_prompts_and_hardly_any_answer_are_no_case_for_a_split() -> None:
    """Half of the engines would have next to nothing to do."""
    loads, targets = [load(2.0, 4000, 3, count=100, seed=seed) for seed in range(2)], Targets(2000.0, 150.0)
    split, together = (
        outcome(Setup(*roles, 512, "fcfs", inline=False), BASE, loads, targets) for roles in ((1, 1, 0), (0, 0, 2))
    )
    assert together.attained > split.attained + 0.2
    found = Advice((together, split), together, split, 2)
    assert found.best is together
    assert found.verdict().startswith("do not disaggregate: 2 hybrids give ")


def test_a_tight_target_for_gaps_beside_long_prompts_needs_a_split() -> None:
    """The decodes' own steps take most of the target, so chunks beside them find no room."""
    times = StepTimes((0.010, 5e-5, 2e-9, 1e-4, 1e-7))
    like = replace(LIKE, times=times, blocks=20_000, max_num_batched_tokens=2048, max_num_seqs=64)
    base = replace(BASE, engines=(like,), tpot_s=0.015, transfer=TransferSpec(bandwidth=5e10, token_bytes=131_072))
    loads, targets = [load(8.0, 3000, 200, seed=seed) for seed in range(2)], Targets(1000.0, 15.0)
    split, together = (
        outcome(Setup(*roles, 2048, "fcfs", inline=True), base, loads, targets) for roles in ((2, 2, 0), (0, 0, 4))
    )
    assert split.attained > 0.9 > together.attained + 0.1
    found = Advice((split, together), together, split, 2)
    assert found.best is split
    assert found.verdict().startswith("disaggregate: 2 prefill + 2 decode give ")


def test_one_engine_cannot_be_split() -> None:
    found = advice(2.0, 200, 10, base=replace(BASE, engines=(LIKE,)), engines=1)
    assert found.split is None
    assert found.verdict().startswith("one engine cannot be split: 1 hybrid")


def test_equal_setups_are_not_told_apart_and_the_simpler_one_is_recommended() -> None:
    met = tuple((9, 10) for _ in range(20))
    split = Outcome(Setup(1, 1, 0, 512, "fcfs", True), 1.0, 1.0, 1.0, 1.0, met, 2.0, 0.5)
    together = replace(split, setup=Setup(0, 0, 2, 512, "fcfs", True))
    found = Advice((split, together), together, split, 2)
    assert found.gain(split, together).is_zero
    assert found.best is together
    assert "are not shown to be better than 2 hybrids: they give 0 (0 to 0) requests/s more" in found.verdict()
    assert found.goodput(split) == (interval := found.goodput(together))
    assert (interval.value, interval.low, interval.high) == pytest.approx((1.8, 1.8, 1.8))


def test_a_split_that_gives_hardly_more_is_not_worth_its_transfers() -> None:
    split = Outcome(Setup(1, 1, 0, 512, "fcfs", True), 1.0, 1.0, 1.0, 1.0, ((100, 100),) * 20, 2.0, 0.5)
    together = replace(split, setup=Setup(0, 0, 2, 512, "fcfs", True), met=((99, 100),) * 20)
    found = Advice((split, together), together, split, 2)
    assert found.gain(split, together).low > 0
    assert found.best is together
    assert "give hardly more than 2 hybrids: 0.02 (0.02 to 0.02)" in found.verdict()
    assert Advice((split, together), replace(together, met=((90, 100),) * 20), split, 2).best is split


def test_the_interval_shrinks_with_the_number_of_blocks() -> None:
    def width(blocks: int) -> float:
        rng = random.Random(3)
        met = tuple((rng.randint(0, 10), 10) for _ in range(blocks))
        one = Outcome(Setup(0, 0, 2, 512, "fcfs", True), 1.0, 1.0, 1.0, 1.0, met, 2.0, 0.5)
        interval = Advice((one,), one, None, 1).goodput(one)
        assert interval.low <= one.goodput <= interval.high
        return interval.high - interval.low

    assert width(100) < 0.7 * width(20)


@pytest.mark.parametrize("engines", [1, 2, 3, 8, 64])
def test_what_is_tried_has_the_engines_that_there_are(engines: int) -> None:
    found = setups(engines, LIKE)
    assert len(set(found)) == len(found) <= 60
    assert all(one.prefills + one.decodes + one.hybrids == engines for one in found)
    assert any(not one.is_split for one in found)
    assert any(one.decodes for one in found) is (engines > 1)
    assert any(one.prefills and one.decodes and one.hybrids for one in found) is (engines > 2)
    assert all(bool(one.prefills) == one.is_split for one in found)


def test_chunks_and_policies_are_tried_and_finalists_get_every_load() -> None:
    told: list[str] = []
    loads = [load(5.0, 800, 20, count=50, seed=seed) for seed in range(2)]
    found = advise(BASE, 2, loads, TARGETS, told.append)
    assert found.tried > len(CHUNKS)
    assert any("sjf" in line for line in told)
    assert all(sum(count for _, count in one.met) == 100 for one in found.finalists)
    assert len({replace(one, setup=found.best.setup) for one in found.finalists}) >= len(found.finalists) - 1
    scores = [one.score(TARGETS) for one in found.finalists]
    assert scores == sorted(scores, reverse=True)
    assert advise(BASE, 2, loads, TARGETS) == found, "the same seeds give the same"
