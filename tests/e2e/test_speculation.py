"""Guessed tokens over real engines: prefill and decode guess, and every answer is that of `generate`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e import parity
from tests.e2e.test_prefix import metric
from tests.service import Run, Service, pid_of, running, topology, wait_until

pytestmark = pytest.mark.e2e

TOKENS = 60
GUESSING = f'speculative = {{ kind = "ngram", tokens = 4, min_ngram = 1 }}\n{parity.FLOAT32}'
ACCEPTED, DRAFTED = "pdctl_engine_accepted_tokens_total", "pdctl_engine_drafted_tokens_total"


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    with running(module_run, topology(engine_extra=GUESSING)) as found:
        yield found


@pytest.fixture(scope="module")
def answered(tiny_model: Path) -> list[tuple[list[int], list[int]]]:
    """Prompts, and what transformers answers."""
    wanted = parity.prompts(tiny_model, (1, 17, 200, 600))
    return list(zip(wanted, parity.reference(tiny_model, wanted, TOKENS), strict=True))


def test_answers_are_those_of_generate(service: Service, answered: list[tuple[list[int], list[int]]]) -> None:
    wanted, expected = map(list, zip(*answered, strict=True))
    parity.compare(service, wanted, expected, TOKENS)

    def has_guessed() -> bool:
        """Engines guess where it pays by what steps have taken, which on a busy machine may be later."""
        service.complete(wanted[1], max_tokens=400, ignore_eos=True)
        return metric(service, "decode-0", ACCEPTED) > 0

    wait_until(has_guessed, what="right guesses")
    service.idle()
    accepted, drafted = metric(service, "decode-0", ACCEPTED), metric(service, "decode-0", DRAFTED)
    assert 0 < accepted <= drafted
    assert service.engine_state("decode-0")["counters"]["accepted"] == accepted
    assert metric(service, "prefill-0", DRAFTED) == 0, "what is kept for a peer is not guessed"
    service.idle()


def test_answers_end_where_they_should(service: Service, answered: list[tuple[list[int], list[int]]]) -> None:
    prompt, ids = answered[2]
    for count in (1, 2, 3, 11):
        answer = service.complete(prompt, max_tokens=count)
        assert answer["token_ids"] == ids[:count]
        assert answer["usage"]["completion_tokens"] == count
        assert answer["finish_reason"] == "length"
    whole = service.complete(prompt, max_tokens=TOKENS)
    stop = whole["text"][20:23]
    stopped = service.stream(prompt, max_tokens=TOKENS, stop=stop)
    assert stopped["text"] == whole["text"][: whole["text"].index(stop)]
    assert stopped["finish_reason"] == "stop"
    last = service.complete(prompt, max_tokens=TOKENS, stop_token_ids=[ids[12]])
    assert last["token_ids"] == ids[: ids.index(ids[12]) + 1]
    service.idle()


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.7, "top_p": 0.9, "seed": 4}])
def test_a_stream_goes_on_after_a_death(
    service: Service, answered: list[tuple[list[int], list[int]]], options: dict[str, float]
) -> None:
    prompt, _ = answered[2]
    quiet = service.complete(prompt, max_tokens=400, ignore_eos=True, **options)
    before = service.process("decode-0")
    core = psutil.Process(pid_of(before)).children()[0].pid
    found = service.stream(
        prompt, lambda: os.kill(core, signal.SIGKILL), max_tokens=400, ignore_eos=True, **options
    )
    assert found["token_ids"] == quiet["token_ids"]
    assert found["text"] == quiet["text"]
    service.restarted(before)
    service.healthy()
    service.idle()
