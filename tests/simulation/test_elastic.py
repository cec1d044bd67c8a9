"""Roles that follow the load in virtual time: no request is lost, and a load that turns is served better."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from pdctl.bench import Record
from pdctl.latency import StepTimes
from pdctl.simulation.service import Service
from pdctl.simulation.spec import Arrival, ElasticSpec, EngineSpec, Fault, ServiceSpec

# A prompt of 1,000 tokens takes half a second, a step of ten answers 40 ms.
TIMES = StepTimes((0.02, 5e-4, 0.0, 2e-3, 0.0))
ELASTIC = ElasticSpec(interval_s=1.0, cooldown_s=10.0)


def fleet(*roles: str) -> ServiceSpec:
    engines = tuple(
        EngineSpec(f"{role[0]}{at}", role, TIMES, 4000, inline_prefill=False) for at, role in enumerate(roles)
    )
    return ServiceSpec(engines, ttft_s=2.0, tpot_s=0.1)


def turning(seed: int, half_s: float = 120.0) -> list[Arrival]:
    """Long prompts, then long answers."""
    rng, at, found = random.Random(seed), 0.0, []
    while at < 2 * half_s:
        is_first = at < half_s
        at += rng.expovariate(3.0 if is_first else 1.2)
        found.append(Arrival(at, rng.randint(600, 1400), 3) if is_first else Arrival(at, 20, rng.randint(150, 400)))
    return found


def good(records: list[Record]) -> int:
    """Requests that met both targets."""
    return sum(
        record.is_good and record.ttft <= 2.0 and sum(record.gaps) / max(1, len(record.gaps)) <= 0.1
        for record in records
    )


def served(spec: ServiceSpec, load: list[Arrival], seed: int = 0) -> tuple[Service, list[Record]]:
    service = Service(spec, seed)
    records = service.run(load)
    service.audit()
    return service, records


def test_a_load_that_turns_is_served_better_than_by_any_fixed_roles() -> None:
    load = turning(1)
    fixed = {
        roles: good(served(fleet(*roles), load)[1])
        for roles in (("prefill", "decode", "decode"), ("prefill", "prefill", "decode"))
    }
    service, records = served(replace(fleet("prefill", "decode", "decode"), elastic=ELASTIC), load)
    assert service.elastic is not None
    assert len(service.elastic.changes) >= 2, "to prefill and back"
    assert good(records) > max(fixed.values())


def test_a_steady_load_changes_nothing() -> None:
    load = [Arrival(0.5 * number, 300, 20) for number in range(200)]
    service, _ = served(replace(fleet("prefill", "decode", "decode"), elastic=ELASTIC), load)
    assert service.elastic is not None
    assert service.elastic.changes == []


@settings(max_examples=10, deadline=None)
@given(
    st.integers(0, 2**16), st.lists(st.sampled_from(["prefill", "decode", "hybrid"]), min_size=2, max_size=5),
    st.booleans(), st.lists(st.tuples(st.integers(0, 4), st.floats(1, 100)), max_size=3),
)  # fmt: skip
def test_no_request_is_lost(seed: int, roles: list[str], inline: bool, deaths: list[tuple[int, float]]) -> None:
    spec = replace(fleet(*roles), elastic=replace(ELASTIC, cooldown_s=2.0))
    engines = tuple(replace(engine, inline_prefill=inline) for engine in spec.engines)
    faults = tuple(Fault(engines[which % len(engines)].name, at, 5.0) for which, at in deaths)
    load = turning(seed, 20.0)
    service, records = served(replace(spec, engines=engines, faults=faults), load, seed)
    assert len(records) == len(load)
    assert all(record.is_good or record.error for record in records)
    assert service.elastic is not None
