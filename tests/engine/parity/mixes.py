"""Random mixes of requests through one engine, compared with transformers: some end early, some are aborted."""

from __future__ import annotations

import random

from msgspec import structs

from pdctl.engine.ipc.messages import Sampling
from tests.engine.parity.engines import Engine, random_setting
from tests.engine.parity.families import VOCAB, Family, expected
from tests.engine.parity.told import told

Request = tuple[list[int], Sampling]


def requests(chance: random.Random, count: int, tokens: int = 10) -> list[Request]:
    """Prompts of 1 to 60 tokens, half of them with a common beginning, greedy and seeded by turns."""
    common = [chance.randrange(5, VOCAB) for _ in range(40)]
    made = []
    for number in range(count):
        length = chance.randint(1, 60)
        prompt = [chance.randrange(5, VOCAB) for _ in range(length)]
        if number % 2:
            shared = chance.randint(1, 40)
            prompt = [*common[:shared], *prompt[: max(1, length - shared)]]
        seeded = Sampling(tokens, temperature=chance.choice((0.7, 1.0)), seed=chance.randrange(2**32), top_p=0.95)
        made.append((prompt, seeded if number % 3 == 1 else Sampling(tokens, temperature=0.0)))
    return made


def check(family: Family, seed: int, count: int = 5) -> Engine:
    """One random setting and one random load: every output is `generate`'s. Two requests come twice, and half of them
    end with a stop token."""
    chance = random.Random(f"{family.kind} {seed}")
    wanted = requests(chance, count)
    answers = [expected(family, *request) for request in wanted]
    greedy = [answer for answer, (_, sampling) in zip(answers, wanted, strict=True) if sampling.temperature == 0]
    assert len({token for answer in greedy for token in answer}) >= 5, "a model that repeats itself proves nothing"
    engine = Engine(family.loaded, random_setting(chance), chance)
    for number in range(0, count, 2):
        (prompt, sampling), answer = wanted[number], answers[number]
        stop = answer[chance.randrange(len(answer))]
        wanted[number] = prompt, structs.replace(sampling, stop_token_ids=[stop])
        answers[number] = answer[: answer.index(stop) + 1]
    with told([[*prompt, *answer] for (prompt, _), answer in zip(wanted, answers, strict=True)], chance):
        for number, request in enumerate([*wanted, *wanted[:2]]):
            engine.add(str(number), *request)
            doomed = chance.random() < 0.3
            if doomed:
                engine.add("doomed", *request)
            for _ in range(chance.randint(0, 6)):
                engine.step()
            if doomed:
                engine.scheduler.abort("doomed")
                # A name is free again when no step has it.
                engine.settle()
        engine.run()
    engine.idle()
    for number, answer in enumerate([*answers, *answers[:2]]):
        assert engine.outputs[str(number)] == answer, f"{family.kind}, {seed}, {engine.setting}, request {number}"
    return engine
