"""Imagined services: every request ends, whatever dies; the same seed gives the same; and times that can be computed by
hand."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from subprocess import run

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdctl.bench import Record
from pdctl.latency import StepTimes
from pdctl.simulation.service import Service
from pdctl.simulation.spec import (
    Arrival,
    Costs,
    EngineSpec,
    Fault,
    MachineSpec,
    ServiceSpec,
    TransferSpec,
)

TIMES = StepTimes((0.01, 0.001, 0.0, 0.0, 0.0))
FREE = Costs(call_s=0.0)
AT_ONCE = TransferSpec(bandwidth=1e15, latency_s=0.0)


def engine(name: str, role: str, blocks: int = 200, **more: object) -> EngineSpec:
    return replace(EngineSpec(name, role, TIMES, blocks), **more)  # type: ignore[arg-type]


def served(spec: ServiceSpec, load: Sequence[Arrival], seed: int = 0) -> tuple[Service, list[Record]]:
    service = Service(spec, seed)
    records = service.run(load)
    service.audit()
    return service, records


def load_of(count: int, seed: int = 1, rate: float = 10.0, shared: bool = False) -> list[Arrival]:
    rng, at, found = random.Random(seed), 0.0, []
    for _ in range(count):
        at += rng.expovariate(rate)
        inputs = rng.randint(1, 600)
        prompt = (*[7] * 100, *[rng.randint(0, 2)] * 600)[:inputs] if shared else ()
        found.append(Arrival(at, inputs, rng.randint(1, 30), prompt, rng.choice("ab")))
    return found


class TestTimes:
    """Times of one request, from the coefficients."""

    def test_one_engine(self) -> None:
        _, (record,) = served(ServiceSpec((engine("h", "hybrid"),), costs=FREE), [Arrival(1.0, 100, 3)])
        assert record.ttft == pytest.approx(0.01 + 0.1)
        assert record.gaps == pytest.approx([0.011, 0.011])
        assert record.engines == {"prefill": "h", "decode": "h"}

    def test_a_pair_moves_the_kv(self) -> None:
        fleet = (engine("p", "prefill"), engine("d", "decode", inline_prefill=False))
        transfer = TransferSpec(bandwidth=100 * 1000 / 0.5, latency_s=0.25, token_bytes=1000, chunked=False)
        spec = ServiceSpec(fleet, transfer=transfer, costs=FREE)
        service, (record,) = served(spec, [Arrival(0.0, 100, 3)])
        assert record.ttft == pytest.approx(0.11)
        assert record.gaps == pytest.approx([0.25 + 0.5 + 0.011, 0.011])
        assert record.engines == {"prefill": "p", "decode": "d"}
        assert service.wires.moved == 100 * 1000

    def test_chunks_are_read_while_the_rest_is_computed(self) -> None:
        fleet = (
            engine("p", "prefill", max_num_batched_tokens=64),
            engine("d", "decode", inline_prefill=False, block_size=32),
        )
        transfer = TransferSpec(bandwidth=64 * 1000 / 0.05, latency_s=0.0, token_bytes=1000)
        _, (record,) = served(ServiceSpec(fleet, transfer=transfer, costs=FREE), [Arrival(0.0, 256, 2)])
        assert record.ttft == pytest.approx(4 * 0.01 + 0.256)
        # Only the last of four chunks is read after the prefill.
        assert record.gaps == pytest.approx([0.05 + 0.011])

    def test_calls_cost_time(self) -> None:
        fleet = (engine("p", "prefill"), engine("d", "decode", inline_prefill=False))
        spec = ServiceSpec(fleet, transfer=AT_ONCE, costs=Costs(call_s=0.5))
        _, (record,) = served(spec, [Arrival(0.0, 100, 2)])
        assert record.ttft == pytest.approx(0.5 + 0.11)
        assert record.gaps == pytest.approx([0.5 + 0.5 + 0.011]), "the hand-over's call and its commit"

    def test_one_token_needs_no_pair(self) -> None:
        fleet = (engine("p", "prefill"), engine("d", "decode", inline_prefill=False))
        _, (record,) = served(ServiceSpec(fleet, costs=FREE), [Arrival(0.0, 100, 1)])
        assert record.engines == {"prefill": "p", "decode": "p"}

    def test_engines_that_share_a_core_take_twice_as_long(self) -> None:
        fleet = tuple(engine(name, "hybrid", machine="m") for name in ("a", "b"))
        spec = ServiceSpec(fleet, costs=FREE, machines={"m": MachineSpec(1)})
        _, records = served(spec, [Arrival(0.0, 100, 1), Arrival(0.0, 100, 1)])
        assert [record.ttft for record in records] == pytest.approx([0.22, 0.22])


FLEETS = st.lists(st.sampled_from(["prefill", "decode", "hybrid"]), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    roles=FLEETS, seed=st.integers(0, 2**16), blocks=st.sampled_from([45, 60, 300]),
    policy=st.sampled_from(["fcfs", "sjf", "ljf", "edf"]),
    routing=st.sampled_from(["min_expected_latency", "min_observed_latency", "prefix_aware", "slo", "round_robin"]),
    admission=st.sampled_from(["queue", "slo"]), inline=st.booleans(), shared=st.booleans(), chunked=st.booleans(),
    deaths=st.lists(st.tuples(st.integers(0, 3), st.floats(0.0, 6.0), st.floats(0.01, 3.0)), max_size=6),
)  # fmt: skip
def test_every_request_ends_once_whatever_dies(
    roles: list[str], seed: int, blocks: int, policy: str, routing: str, admission: str, inline: bool, shared: bool,
    chunked: bool, deaths: list[tuple[int, float, float]],
) -> None:  # fmt: skip
    fleet = tuple(
        engine(
            f"{role}{n}", role, blocks, policy=policy, inline_prefill=inline, max_num_batched_tokens=128,
            max_num_seqs=4, machine="m" if n % 2 else "",
        )
        for n, role in enumerate(roles)
    )  # fmt: skip
    faults = tuple(Fault(fleet[at % len(fleet)].name, when, after) for at, when, after in deaths)
    spec = ServiceSpec(
        fleet, routing=routing, admission=admission, machines={"m": MachineSpec(2, 1.5)}, faults=faults,
        transfer=TransferSpec(bandwidth=1e7, token_bytes=10_000, chunked=chunked), costs=Costs(jitter=0.2),
    )  # fmt: skip
    load = load_of(40, seed, shared=shared)
    _, records = served(spec, load, seed)
    for record, arrival in zip(records, load, strict=True):
        if record.is_good:
            assert record.output_tokens == arrival.outputs == len(record.gaps) + 1
            assert record.sent_at <= record.first_at <= record.ended_at
        else:
            refused = ("refused: ", "no engine is ready", "needs ", "the request failed ")
            assert record.error.startswith(refused), record.error
    if not faults and admission == "queue":
        assert all(record.is_good for record in records)
    assert served(spec, load, seed)[1] == records, "the same seed gives the same"


def test_failures_are_answered_by_the_shipped_failover() -> None:
    fleet = tuple(engine(f"{role}{n}", role, 2000) for role in ("prefill", "decode") for n in range(2))
    faults = tuple(Fault(one.name, 1.0 + n, 0.8) for n, one in enumerate(fleet))
    service, records = served(ServiceSpec(fleet, faults=faults), load_of(60, rate=12.0))
    assert service.failures > 5
    assert all(record.is_good for record in records), "no client sees a death"
    quiet = served(ServiceSpec(fleet), load_of(60, rate=12.0))[1]
    assert max(max(r.gaps, default=0.0) for r in records) > max(max(r.gaps, default=0.0) for r in quiet)


def test_without_any_engine_requests_fail_after_the_shipped_time() -> None:
    spec = ServiceSpec((engine("h", "hybrid"),), faults=(Fault("h", 0.5, 1000.0),))
    _, (record,) = served(spec, [Arrival(1.0, 10, 2)])
    assert record.error == "no engine is ready"
    assert record.latency == pytest.approx(60.0, abs=1.0)


def test_prompts_that_begin_alike_are_found_in_the_cache() -> None:
    load = [Arrival(2.0 * n, 1024 + n, 2, (*range(1024), *[n] * n)) for n in range(4)]
    _, records = served(ServiceSpec((engine("h", "hybrid", 2000),), costs=FREE), load)
    assert records[0].ttft > 1.0
    assert all(record.ttft < 0.2 for record in records[1:])


def test_short_prompts_are_computed_inline() -> None:
    fleet = (engine("p", "prefill", 2000), engine("d", "decode", 2000))
    service, _ = served(ServiceSpec(fleet), load_of(100, rate=3.0))
    assert service.placed["short"] > 0
    assert service.placed["remote"] > 0
    assert sum(service.placed.values()) == 100


def test_one_key_that_floods_does_not_delay_another() -> None:
    flood = [Arrival(0.001 * n, 200, 20, key="loud") for n in range(100)]
    quiet = [Arrival(1.0 + n, 50, 5, key="quiet") for n in range(5)]
    _, records = served(ServiceSpec((engine("h", "hybrid", 2000, max_num_seqs=4),)), [*flood, *quiet])
    waits = [record.parts["queue"] for record in records]
    assert max(waits[100:]) < 0.3 * max(waits[:100])


def test_no_torch_is_imported() -> None:
    heavy = "('torch', 'numpy', 'transformers')"
    code = f"import sys, pdctl.simulation.service; print([name for name in {heavy} if name in sys.modules])"
    assert run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
