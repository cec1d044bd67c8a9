"""Profiles from the latency models that engines have of themselves."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from pdctl.bench.profile import of_engines
from pdctl.commands.bench.own_models import curves, engines_table, own_profile
from pdctl.control_api import MeasuredProcess, MeasuredStatus, StepLatency, StepPredictions
from pdctl.errors import PdctlError
from pdctl.latency import StepTimes, step_of

COEFFICIENTS = (0.004, 2e-4, 3e-8, 1e-4, 5e-7)
MODEL = StepLatency(
    coefficients=COEFFICIENTS,
    corrections=(1.5, 0.5, 1.0),
    slow=1.2,
    predictions=tuple(
        StepPredictions(kind=kind, steps=steps, actual_s=1.0, predicted_s=1.1, mean_error=0.1)
        for kind, steps in (("prefill", 20), ("decode", 400), ("mixed", 0))
    ),
)


def process(name: str, role: str, latency: StepLatency | None) -> MeasuredProcess:
    return MeasuredProcess(
        name=name, kind="builtin", role=role, group=role, state="ready", reason="", pid=1, restarts=0, last_exit=None,
        device="cpu", cpus=(), gpus=(), rdma=(), ports={}, ready_since=None, epoch="e", adopted=False, log="",
        rss_bytes=None, cpu_percent=None, gpu_memory_bytes=None, running=0, waiting=0, kv_used=0.0, leases=0,
        tokens_per_s=0.0, phase="", phase_s=None, prompts_own=0, prompts_received=0, latency=latency,
    )  # fmt: skip


def status(*processes: MeasuredProcess) -> MeasuredStatus:
    return MeasuredStatus(
        service="s", state="ready", failure=None, proxy_url="", model="m", served_model_name="m", tls_cert="",
        supervisor_pid=1, run_dir="", log_dir="", source="", trees="sweep", apply=None, processes=processes,
        attached=(), links=(),
    )  # fmt: skip


def test_the_profile_predicts_what_the_engines_do() -> None:
    found = of_engines("m", "today", MODEL, MODEL, 512, 8)
    times = StepTimes(COEFFICIENTS, MODEL.corrections)
    assert found.ttft_s(300) == pytest.approx(times.seconds(step_of([(300, 0)])))
    assert found.tpot_s(4, 100) == pytest.approx(times.seconds(step_of([(1, 100)] * 4)))
    assert found.prefill.points == (0, 20)
    assert found.decode.error == 0.1


@pytest.mark.parametrize("roles", [("prefill", "decode"), ("hybrid",), ("decode",), ("prefill", "hybrid")])
def test_any_roles_make_a_profile(roles: tuple[str, ...]) -> None:
    engines = [process(role, role, MODEL) for role in roles]
    found = own_profile(status(*engines, process("proxy", "proxy", None)), 512, 8)
    assert found is not None
    assert (found.longest, found.widest) == (512, 8)


def test_without_a_model_of_every_engine_there_is_none() -> None:
    assert own_profile(status(process("a", "prefill", MODEL), process("b", "decode", None)), 512, 8) is None
    assert own_profile(status(process("proxy", "proxy", None)), 512, 8) is None


def test_the_engines_predictions_are_shown() -> None:
    table = engines_table(status(process("a", "hybrid", MODEL)))
    assert table.splitlines()[1].split() == ["a", "prefill", "20", "50.0", "10%"]
    assert "mixed" not in table
    unused = tuple(replace(one, steps=0) for one in MODEL.predictions)
    assert engines_table(status(process("a", "hybrid", replace(MODEL, predictions=unused)))) == "no steps yet"


def test_curves_are_those_of_the_models() -> None:
    with pytest.raises(PdctlError, match="no engine"):
        curves(status(process("proxy", "proxy", None)), 512, 8)
    found = curves(status(process("a", "hybrid", MODEL)), 512, 8)
    one_s = StepTimes(COEFFICIENTS, MODEL.corrections).seconds(step_of([(1, 256)]))
    sequences, milliseconds = found["decode"].lines["a"][0]
    assert sequences == 1.0
    assert milliseconds == pytest.approx(1000 * one_s)
    assert found["prefill"].lines["a"][-1][0] == 512
