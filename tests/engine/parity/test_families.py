"""Model families under random loads: chunks, preemptions, prefix hits, greedy and seeded, against transformers.

`scripts/parity` runs many more of these loads, and all ways of running for every family."""

from __future__ import annotations

import pytest
from msgspec import structs

from pdctl.engine.ipc.messages import Sampling
from tests.engine.parity import metamorphic, mixes
from tests.engine.parity.families import FAMILIES, LAYERS, build, expected


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_random_load_equals_generate(kind: str) -> None:
    family = build(kind)
    assert len(family.loaded.shapes) == LAYERS, "not every layer is hooked"
    engine = mixes.check(family, seed=0)
    assert engine.preempted or engine.cached, "this load shows no more than a plain one"


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other draws are noticed, and KV of the wrong tokens. (Wrong windows and masks are refused at load.)"""
    family = build("gemma3_text")
    with monkeypatch.context() as patch:
        patch.setattr(
            mixes, "expected", lambda family, prompt, sampling: expected(family, prompt, _reseeded(sampling))
        )
        with pytest.raises(AssertionError, match="request"):
            mixes.check(family, seed=0)
    # A name that does not cover the tokens: every prompt finds the blocks of another one.
    monkeypatch.setattr("pdctl.engine.cache.prefix.following", lambda before, tokens: before + bytes([len(tokens)]))
    with pytest.raises(AssertionError, match="request"):
        mixes.check(family, seed=0)


def _reseeded(sampling: Sampling) -> Sampling:
    return structs.replace(sampling, seed=sampling.seed + 1)


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt_oss"])
def test_every_way_to_run_gives_the_same_tokens(kind: str) -> None:
    family = build(kind)
    answers = metamorphic.reference(family)
    assert metamorphic.alone(family, metamorphic.PLAIN) == answers
    with metamorphic.told_answers(answers):
        for name, run in metamorphic.variants():
            assert run(family) == answers, name


def test_a_request_goes_on_elsewhere_at_every_token() -> None:
    family = build("gemma3_text")
    metamorphic.check_migrations(family, metamorphic.reference(family))
