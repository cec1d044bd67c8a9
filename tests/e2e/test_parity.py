"""Every topology gives the tokens that transformers' `generate` gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdctl.host.users import cache_root
from tests.e2e import parity
from tests.service import Run, running, topology

pytestmark = pytest.mark.e2e

TOKENS = 24


@pytest.fixture(scope="module")
def tiny_path(tiny_model: Path) -> Path:
    return tiny_model


@pytest.fixture(scope="module")
def tiny_expected(tiny_path: Path) -> tuple[list[list[int]], list[list[int]]]:
    wanted = parity.prompts(tiny_path)
    expected = parity.reference(tiny_path, wanted, TOKENS)
    # With a model that repeats itself, equality would mean little.
    distinct = [len(set(ids)) for ids in expected]
    assert sum(distinct) / len(distinct) > 8, distinct
    return wanted, expected


@pytest.mark.parametrize(
    ("prefills", "decodes", "hybrids"),
    [
        pytest.param(1, 1, 0, id="1P1D"),
        pytest.param(1, 2, 0, id="1P2D", marks=pytest.mark.slow),
        pytest.param(2, 1, 0, id="2P1D", marks=pytest.mark.slow),
        pytest.param(0, 0, 1, id="1H"),
    ],
)
def test_tiny_equals_generate(
    run: Run,
    tiny_expected: tuple[list[list[int]], list[list[int]]],
    prefills: int,
    decodes: int,
    hybrids: int,
) -> None:
    wanted, expected = tiny_expected
    text = topology(prefills=prefills, decodes=decodes, hybrids=hybrids, engine_extra=parity.FLOAT32)
    with running(run, text) as service:
        parity.compare(service, wanted, expected, TOKENS)
        service.idle()
        moved = sum(service.engine_state(engine.name)["transfers"]["hand_overs"] for engine in service.engines())
        assert moved == (0 if hybrids else 3 * len(wanted)), "the KV did not move as it should"


@pytest.mark.gemma
@pytest.mark.parametrize(
    ("lengths", "tokens"),
    [((1, 33, 300), 8), pytest.param((1, 16, 33, 257, 600), 12, marks=pytest.mark.slow)],
)
def test_gemma_equals_generate(run: Run, lengths: tuple[int, ...], tokens: int) -> None:
    path = cache_root() / "models" / "gemma-3-270m-r1"
    text = topology("sample:gemma-3-270m", kv_cache_gb=0.5, engine_extra=parity.FLOAT32)
    with running(run, text) as service:
        wanted = parity.prompts(path, lengths)
        expected = parity.reference(path, wanted, tokens)
        parity.compare(service, wanted, expected, tokens)
        service.idle()
