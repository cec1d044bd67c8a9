from __future__ import annotations

import json
import queue
from pathlib import Path

import pytest
import torch

from pdctl.engine.grammar import Grammars
from pdctl.engine.messages import Sampling
from pdctl.engine.samples.tiny import build
from pdctl.engine.sequence import Sequence

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


def prepared(grammars: Grammars, grammar: str) -> str:
    said: queue.Queue[str] = queue.Queue()
    grammars.prepare(grammar, lambda: True, said.put)
    return said.get(timeout=60)


def generate(grammars: Grammars, sequence: Sequence, seed: int, most: int = 80) -> None:
    """Random logits: only the grammar decides what is left."""
    generator = torch.Generator().manual_seed(seed)
    while len(sequence.token_ids) - sequence.prompt_len < most:
        row = torch.randn(VOCAB, generator=generator)
        grammars.mask(row, sequence)
        token_id = int(row.argmax())
        grammars.accept(sequence, token_id)
        sequence.token_ids.append(token_id)
        if token_id == END:
            return


def text_of(model: Path, ids: list[int]) -> str:
    from tokenizers import Tokenizer

    return str(Tokenizer.from_file(str(model / "tokenizer.json")).decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_model_says_the_output_matches(model: Path, seed: int) -> None:
    grammars = Grammars(model, VOCAB, frozenset({END}))
    grammar = json.dumps({"json": SCHEMA})
    assert prepared(grammars, grammar) == ""
    sequence = Sequence("r", [1, 2, 3], 3, Sampling(80, grammar=grammar))
    generate(grammars, sequence, seed)
    assert sequence.token_ids[-1] == END
    assert json.loads(text_of(model, sequence.token_ids[3:]))["ok"] in (True, False)


def test_a_moved_sequence_goes_on_where_it_was(model: Path) -> None:
    grammars = Grammars(model, VOCAB, frozenset({END}))
    grammar = json.dumps({"regex": "[a-f]{12}"})
    assert prepared(grammars, grammar) == ""
    whole = Sequence("r", [1], 1, Sampling(80, grammar=grammar))
    generate(grammars, whole, 5)
    for cut in range(1, len(whole.token_ids)):
        elsewhere = Grammars(model, VOCAB, frozenset({END}))
        moved = Sequence("r", whole.token_ids[:cut], 1, Sampling(80, grammar=grammar))
        for sequence, owner in (
            (moved, elsewhere),
            (Sequence("r", whole.token_ids[:cut], 1, moved.sampling), grammars),
        ):
            row = torch.zeros(VOCAB)
            owner.mask(row, sequence)
            assert row[whole.token_ids[cut]] == 0, "what was allowed there is allowed here"
            assert (row == float("-inf")).sum() > 300


@pytest.mark.parametrize("grammar", [{"json": {"type": "nonsense"}}, {"regex": "(["}])
def test_what_cannot_be_compiled_says_why(model: Path, grammar: dict[str, object]) -> None:
    grammars = Grammars(model, VOCAB, frozenset({END}))
    assert "cannot be compiled" in prepared(grammars, json.dumps(grammar))
    assert "end token" in prepared(Grammars(model, VOCAB, frozenset()), '{"json": true}')
