from __future__ import annotations

import json
import queue
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import xgrammar

from pdctl.engine.ipc.messages import Sampling, Thinking
from pdctl.engine.model.grammar import Grammars
from pdctl.engine.samples.tiny import build
from pdctl.engine.schedule.sequence import Sequence

VOCAB, END = 384, 383
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build(folder, lambda *_: None)
    return folder


@pytest.fixture(scope="module")
def ours(model: Path) -> Iterator[Grammars]:
    found = Grammars(model, VOCAB, frozenset({END}))
    yield found
    found.close()
    for process in psutil.Process().children():
        process.wait(60)


def prepared(ours: Grammars, grammar: str) -> tuple[xgrammar.CompiledGrammar | None, str]:
    said: queue.Queue[tuple[xgrammar.CompiledGrammar | None, str]] = queue.Queue()
    ours.prepare(grammar, "", lambda: True, lambda compiled, reason: said.put((compiled, reason)))
    return said.get(timeout=300)


def guided(ours: Grammars, grammar: str, token_ids: list[int], prompt_len: int) -> Sequence:
    compiled, reason = prepared(ours, grammar)
    assert reason == ""
    assert compiled is not None
    sequence = Sequence("r", token_ids, prompt_len, Sampling(80, grammar=grammar))
    ours.begin(sequence, compiled)
    return sequence


def generate(ours: Grammars, sequence: Sequence, seed: int, most: int = 80) -> None:
    """With random logits, only the grammar restricts the output."""
    generator = torch.Generator().manual_seed(seed)
    while len(sequence.token_ids) - sequence.prompt_len < most:
        row = torch.randn(VOCAB, generator=generator)
        ours.mask(row, sequence)
        token_id = int(row.argmax())
        ours.accept(sequence, token_id)
        sequence.token_ids.append(token_id)
        if token_id == END:
            return


def text_of(model: Path, ids: list[int]) -> str:
    from tokenizers import Tokenizer

    return str(Tokenizer.from_file(str(model / "tokenizer.json")).decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_model_says_the_output_matches(model: Path, ours: Grammars, seed: int) -> None:
    sequence = guided(ours, json.dumps({"json": SCHEMA}), [1, 2, 3], 3)
    generate(ours, sequence, seed)
    assert sequence.token_ids[-1] == END
    assert json.loads(text_of(model, sequence.token_ids[3:]))["ok"] in (True, False)


def test_a_moved_sequence_goes_on_where_it_was(model: Path, ours: Grammars) -> None:
    grammar = json.dumps({"regex": "[a-f]{12}"})
    whole = guided(ours, grammar, [1], 1)
    generate(ours, whole, 5)
    for cut in range(1, len(whole.token_ids)):
        sequence = guided(ours, grammar, whole.token_ids[:cut], 1)
        row = torch.zeros(VOCAB)
        ours.mask(row, sequence)
        assert row[whole.token_ids[cut]] == 0, "what was allowed there is allowed here"
        assert (row == float("-inf")).sum() > 300


BEGIN, OVER = 300, 301


def thinking(ours: Grammars, token_ids: list[int], is_open: bool) -> Sequence:
    found = guided(ours, json.dumps({"regex": "[a-f]{12}"}), token_ids, 1)
    found.sampling = Sampling(80, grammar=found.sampling.grammar, thinking=Thinking(BEGIN, OVER, is_open))
    compiled, _ = prepared(ours, found.sampling.grammar)
    assert compiled is not None
    ours.begin(found, compiled)
    return found


def allowed(ours: Grammars, sequence: Sequence) -> set[int]:
    row = torch.zeros(VOCAB)
    ours.mask(row, sequence)
    return set(torch.nonzero(row == 0).flatten().tolist())


@pytest.mark.parametrize("is_open", [False, True])
def test_the_grammar_begins_after_the_reasoning(model: Path, ours: Grammars, is_open: bool) -> None:
    guided_only = allowed(ours, guided(ours, json.dumps({"regex": "[a-f]{12}"}), [1], 1))
    assert BEGIN not in guided_only
    sequence = thinking(ours, [1], is_open)
    words = [*([] if is_open else [BEGIN]), 40, 50, BEGIN, 60, OVER]
    for number, token_id in enumerate(words):
        first = number == 0 and not is_open
        assert allowed(ours, sequence) == (guided_only | {BEGIN} if first else set(range(VOCAB)) - {END})
        ours.accept(sequence, token_id)
        sequence.token_ids.append(token_id)
    assert allowed(ours, sequence) == guided_only
    generate(ours, sequence, 3)
    answer = sequence.token_ids[1 + len(words) : -1]
    assert re.fullmatch("[a-f]{12}", text_of(model, answer))
    for cut in range(1, len(sequence.token_ids)):
        moved = thinking(ours, sequence.token_ids[:cut], is_open)
        assert sequence.token_ids[cut] in allowed(ours, moved), "another engine goes on as this one would"


def test_an_answer_may_do_without_reasoning(model: Path, ours: Grammars) -> None:
    sequence = thinking(ours, [1], is_open=False)
    first = min(allowed(ours, sequence) - {BEGIN})
    ours.accept(sequence, first)
    sequence.token_ids.append(first)
    generate(ours, sequence, 3)
    assert re.fullmatch("[a-f]{12}", text_of(model, sequence.token_ids[1:-1]))


@pytest.mark.parametrize("grammar", [{"json": {"type": "nonsense"}}, {"regex": "(["}, {"ebnf": "root ::= x"}])
def test_what_cannot_be_compiled_says_why(ours: Grammars, grammar: dict[str, object]) -> None:
    assert "cannot be compiled" in prepared(ours, json.dumps(grammar))[1]


def test_a_model_without_an_end_guides_nothing(model: Path) -> None:
    before = set(psutil.Process().children())
    endless = Grammars(model, VOCAB, frozenset())
    assert "end token" in prepared(endless, '{"json": true}')[1]
    endless.close()
    for process in set(psutil.Process().children()) - before:
        process.wait(60)


def test_what_is_compiled_begins_at_once(ours: Grammars) -> None:
    """Whatever else is being compiled: no queue, no process, and the result before `prepare` returns."""
    grammar = json.dumps({"regex": "x+"})
    assert prepared(ours, grammar)[1] == ""
    said: list[str] = []
    ours.prepare(grammar, "", lambda: False, lambda compiled, reason: said.append(reason))
    assert said == [""]
