"""Guessed tokens together with everything that changes how a token is chosen or what is told of it."""

from __future__ import annotations

import random

import pytest
from msgspec import structs

from pdctl.engine.ipc.messages import Logprobs, Sampling
from tests.engine.parity.engines import Engine, Setting
from tests.engine.parity.families import VOCAB, Family, build
from tests.engine.parity.told import TOLD, told

PROMPT = [random.Random(2).randrange(5, VOCAB) for _ in range(20)]
GREEDY = Sampling(30, temperature=0.0)
SEEDED = Sampling(30, temperature=0.9, seed=3, min_p=0.01)


@pytest.fixture(scope="module")
def family() -> Family:
    return build("qwen3")


class Watched(Engine):
    """Also keeps the log probabilities."""

    def answer(self, sampling: Sampling) -> tuple[list[int], list[Logprobs]]:
        told_logprobs: list[Logprobs] = []
        update = self.scheduler.update

        def updated(*args: object) -> object:
            outcome = update(*args)  # type: ignore[arg-type]
            told_logprobs.extend(token.logprobs for token in outcome.tokens if token.logprobs is not None)
            return outcome

        self.scheduler.update = updated  # type: ignore[method-assign,assignment]
        self.add("a", PROMPT, sampling)
        self.run()
        self.idle()
        return self.outputs["a"], told_logprobs


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"presence_penalty": 0.8, "frequency_penalty": 0.5},
        {"repetition_penalty": 1.4},
        {"logit_bias": {7: 5.0, 9: -5.0}},
        {"allowed_token_ids": list(range(5, 40))},
        {"logprobs": 3},
        {"bad_words": "from the answer"},
        {"stop_token_ids": "from the answer", "min_tokens": 20},
    ],
)
@pytest.mark.parametrize("base", [GREEDY, SEEDED])
def test_every_parameter_has_its_effect_on_guessed_tokens(
    family: Family, base: Sampling, changed: dict[str, object]
) -> None:
    first = Watched(family.loaded, Setting()).answer(base)[0]
    if "bad_words" in changed:
        changed = {"bad_words": [[first[8]], first[15:17]]}
    if "stop_token_ids" in changed:
        changed |= {"stop_token_ids": [first[10], first[25]]}
    sampling = structs.replace(base, **changed)
    expected, expected_logprobs = Watched(family.loaded, Setting()).answer(sampling)
    engine = Watched(family.loaded, Setting(speculative=TOLD))
    with told([[*PROMPT, *expected]], random.Random(1)):
        found, logprobs = engine.answer(sampling)
    assert found == expected
    assert engine.accepted > 5
    assert len(logprobs) == len(expected_logprobs) == (len(expected) if sampling.logprobs >= 0 else 0)
    for mine, other in zip(logprobs, expected_logprobs, strict=True):
        assert [token for token, _ in mine] == [token for token, _ in other]
        assert [logprob for _, logprob in mine] == pytest.approx([logprob for _, logprob in other], abs=1e-4)
