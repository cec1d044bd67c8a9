"""A short run of scripts/try-parallel: unequal widths and block sizes, and ranks that are killed in the middle."""

from __future__ import annotations

import pytest

from tests.parallel.run import LONG, TOKENS, Count, kills, parity
from tests.parallel.widths import SINGLE, Answers, Ask, Width, answers, asks, service_of

pytestmark = pytest.mark.e2e

MODEL = "sample:tiny-qwen3"
VOCABULARY = 300


@pytest.fixture(scope="module")
def wanted() -> list[Ask]:
    return asks(VOCABULARY, TOKENS)


@pytest.fixture(scope="module")
def long(wanted: list[Ask]) -> list[Ask]:
    return [ask._replace(options={**ask.options, "max_tokens": LONG}) for ask in wanted[-9:]]


@pytest.fixture(scope="module")
def expected(wanted: list[Ask], long: list[Ask]) -> tuple[Answers, Answers]:
    with service_of(SINGLE, MODEL) as service:
        return answers(service, wanted), answers(service, long)


@pytest.mark.parametrize(
    "width",
    [
        Width(2, 1, 16, 32),
        Width(1, 1, prefill_stages=2),
        Width(1, 1, prefill_stripes=2),
        Width(2, 1, 16, 32, transport="auto", keeps=True, apart=True),
        pytest.param(Width(1, 1, data_parallel=2), marks=pytest.mark.slow),
        pytest.param(Width(2, 1, 16, 32, prefill_stages=2), marks=pytest.mark.slow),
        pytest.param(Width(1, 2, transport="mooncake"), marks=pytest.mark.slow),
        pytest.param(Width(2, 2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_engines_of_any_width_answer_as_one_process(
    width: Width, wanted: list[Ask], expected: tuple[Answers, Answers]
) -> None:
    count = Count()
    parity(count, width, MODEL, wanted, expected[0])
    assert count.held, count


def test_answers_survive_the_death_of_a_rank(long: list[Ask], expected: tuple[Answers, Answers]) -> None:
    count = Count()
    kills(count, Width(2, 2), MODEL, long, expected[1], rounds=3, seed=3)
    assert count.held, count


def test_a_difference_is_noticed() -> None:
    found = []
    for answer, check in (([1, 3], True), ([1, 2], True), ([1, 2], False)):
        count = Count()
        assert not count.held, "nothing was compared"
        count.compare("x", [[1, 2]], [answer])
        count.check("y", check)
        found.append((len(count.wrong), len(count.broken)))
    assert found == [(1, 0), (0, 0), (0, 1)]
