"""The same requests through engines that run otherwise: every token must be the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from pdctl.engine.schedule.prompts.policies import POLICIES
from pdctl.speculative import Speculative
from tests.engine.parity.engines import Engine, Setting, hand_over
from tests.engine.parity.families import Family, expected
from tests.engine.parity.mixes import Request, requests
from tests.engine.parity.told import TOLD, told

TOKENS = 10
PLAIN = Setting(shares=False, seqs=1)

Outputs = list[list[int]]


def wanted() -> list[Request]:
    """Requests that all variants get."""
    return requests(random.Random(11), 5, TOKENS)


def settings() -> dict[str, Setting]:
    """Ways to run one engine."""
    base = Setting()
    found = {f"blocks of {size}": replace(base, block_size=size, blocks=768 // size) for size in (16, 32)}
    found |= {f"budget {tokens}": replace(base, tokens=tokens) for tokens in (7, 16, 64)}
    found |= {f"policy {policy}": replace(base, policy=policy, tokens=16) for policy in sorted(POLICIES)}
    found |= {f"preempted every {steps}": replace(base, preempt_every=steps, tokens=16) for steps in (1, 2, 3, 5)}
    guessing = replace(base, speculative=TOLD, tokens=24)
    found |= {"guessing": guessing, "guessing, preempted": replace(guessing, preempt_every=2, blocks=40)}
    found |= {"guessing by n-grams": replace(base, speculative=Speculative("ngram", 4, 1, 2))}
    segments = replace(base, segment=16)
    found |= {"segments": segments, "segments, preempted": replace(segments, preempt_every=2, blocks=40)}
    found |= {"segments, guessing": replace(segments, speculative=TOLD)}
    found |= {"prefix cache off": replace(base, shares=False), "small pool": replace(base, blocks=20)}
    ahead = replace(base, ahead=True)
    found |= {"ahead": ahead, "ahead, small pool": replace(ahead, blocks=20)}
    found |= {"ahead, preempted": replace(ahead, preempt_every=3), "ahead, graphs": replace(ahead, graphs=True)}
    return found | {"batched decode": replace(base, pads=True), "graphs": replace(base, graphs=True)}


def alone(family: Family, setting: Setting, resumed: Outputs | None = None) -> Outputs:
    """All requests in one engine; `resumed`: output that each has already."""
    engine = Engine(family.loaded, setting)
    before = resumed or [[] for _ in wanted()]
    for number, ((prompt, sampling), resume) in enumerate(zip(wanted(), before, strict=True)):
        engine.add(str(number), prompt, sampling, tuple(resume))
        engine.step()
    engine.run()
    engine.idle()
    assert engine.preempted or not setting.preempt_every, "nothing was preempted"
    assert engine.accepted or setting.speculative is not TOLD, "no guess was right"
    assert engine.launched_ahead or not setting.ahead, "no step was launched ahead"
    return [[*resume, *engine.outputs[str(number)]] for number, resume in enumerate(before)]


def paired(family: Family, prefill: Setting, decode: Setting, resumed: Outputs | None = None) -> Outputs:
    """All requests through a prefill and a decode engine, each handed over after one token."""
    source, target = Engine(family.loaded, prefill), Engine(family.loaded, decode)
    before = resumed or [[] for _ in wanted()]
    asked = list(zip(map(str, range(len(before))), wanted(), before, strict=True))
    for name, (prompt, sampling), resume in asked:
        source.add(name, prompt, sampling, tuple(resume), hold=True)
    source.run()
    found = []
    for name, (prompt, sampling), resume in asked:
        found.append([*resume])
        if name in source.outputs:  # its last token
            found[-1] += source.outputs[name]
            continue
        found[-1].append(source.held[name].token_id)
        hand_over(source, target, name, prompt, sampling, resume)
        target.step()
    target.run()
    source.idle()
    target.idle()
    assert target.accepted or decode.speculative is not TOLD, "no guess was right"
    assert target.launched_ahead or not decode.ahead, "no step was launched ahead"
    return [[*first, *target.outputs.get(name, [])] for (name, _, _), first in zip(asked, found, strict=True)]


@contextmanager
def told_answers(answers: Outputs) -> Iterator[None]:
    """Within, engines that guess are told these answers, and spoil some."""
    with told([[*prompt, *answer] for (prompt, _), answer in zip(wanted(), answers, strict=True)], random.Random(5)):
        yield


def variants() -> Iterator[tuple[str, Callable[[Family], Outputs]]]:
    """All ways, by name."""
    for name, setting in settings().items():
        yield name, lambda family, setting=setting: alone(family, setting)  # type: ignore[misc]
    sizes = {size: Setting(block_size=size, blocks=768 // size, tokens=16) for size in (8, 16, 32)}
    for one, other in ((16, 16), (16, 32), (32, 8)):
        yield (
            f"P/D, blocks of {one} to {other}",
            lambda family, one=one, other=other: paired(family, sizes[one], sizes[other]),  # type: ignore[misc]
        )
    preempting = replace(sizes[16], preempt_every=2)
    yield "P/D, both preempted", lambda family: paired(family, preempting, preempting)
    guessing = replace(sizes[16], speculative=TOLD)
    yield "P/D, both guessing", lambda family: paired(family, guessing, guessing)
    ahead = replace(sizes[16], ahead=True)
    yield "P/D, both ahead", lambda family: paired(family, ahead, ahead)
    unshared = replace(sizes[16], shares=False)
    yield "P/D, prefix cache off", lambda family: paired(family, unshared, unshared)


def reference(family: Family) -> Outputs:
    """What `generate` gives."""
    return [expected(family, *request) for request in wanted()]


def check_migrations(family: Family, answers: Outputs) -> None:
    """Every request goes on elsewhere at every index: with its KV handed over, and computed again."""
    for index in range(1, TOKENS):
        begun = [answer[:index] for answer in answers]
        assert alone(family, Setting(tokens=16), begun) == answers, f"resumed at token {index}"
        moved = paired(family, Setting(tokens=16), Setting(block_size=16, blocks=48), begun)
        assert moved == answers, f"handed over at token {index}"
