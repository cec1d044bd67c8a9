"""Output that must match a grammar: xgrammar compiles it, and this module advances it with the tokens.

A grammar is written as JSON: {"json": SCHEMA} (true for any JSON object), {"regex": PATTERN} or {"ebnf": GRAMMAR}. The
state of a sequence's grammar is derived from its output tokens, so a request that moved to another engine continues
correctly.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pdctl.engine.ipc.messages import Thinking
from pdctl.engine.lifeline import die_with_parent
from pdctl.engine.model.compilers import BadGrammar, Compilers, serve
from pdctl.engine.schedule.sequence import Sequence
from pdctl.host import program

if TYPE_CHECKING:
    import xgrammar

# Size of the LRU cache of compiled grammars.
_MAX_GRAMMARS = 64
# Maximum consecutive white space between two parts of a JSON answer.
_MAX_BLANKS = 16
# Memory limit of a compiler process, bytes.
_MAX_MEMORY = 4 << 30


# A character of a string with a length, as xgrammar prints it, and the characters that JSON allows there. Neither can
# occur in a quoted part of a printed grammar: that is JSON text with doubled backslashes.
_ANY_LETTER, _JSON_LETTER = r"[^\"\\\r\n]", r"[^\0-\x1f\"\\\r\n]"


class _Place(Enum):
    FIRST = auto()  # before the first token, which may begin reasoning
    THINKING = auto()
    GUIDED = auto()


@dataclass(slots=True)
class _Guide:
    """Where a sequence is, after `accepted` tokens of its output."""

    matcher: xgrammar.GrammarMatcher
    thinking: Thinking | None
    place: _Place
    accepted: int = 0

    def advance(self, token_id: int) -> None:
        """Take the next token."""
        self.accepted += 1
        thinking = self.thinking
        if thinking is not None and self.place is _Place.FIRST and token_id == thinking.begin:
            self.place = _Place.THINKING
        elif thinking is not None and self.place is _Place.THINKING:
            self.place = _Place.GUIDED if token_id == thinking.end else _Place.THINKING
        else:
            self.place = _Place.GUIDED
            if not self.matcher.is_terminated():
                self.matcher.accept_token(token_id)


class Grammars:
    """Grammars compiled in other processes: no step waits for a compilation, and cached ones start at once.

    `model`: a folder with tokenizer.json; None for an engine without guided output.
    """

    def __init__(self, model: Path | None, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokens = _Tokens(model, vocab_size, tuple(sorted(eos_token_ids)))
        self._compiled: OrderedDict[str, xgrammar.CompiledGrammar] = OrderedDict()
        self._bitmask: torch.Tensor | None = None
        self._lock = threading.Lock()
        self._compilers = Compilers(self._tokens.argv)

    def prepare(
        self,
        grammar: str,
        tenant: str,
        is_wanted: Callable[[], bool],
        then: Callable[[xgrammar.CompiledGrammar | None, str], None],
    ) -> None:
        """Call `then` with the compiled grammar (at once if cached), or with None and the reason."""
        if (known := self._known(grammar)) is not None:
            then(known, "")
            return

        def done(data: bytes, reason: str) -> None:
            then(None if reason else self._keep(grammar, data), reason)

        self._compilers.submit(grammar, tenant, is_wanted, done)

    def begin(self, sequence: Sequence, compiled: xgrammar.CompiledGrammar) -> None:
        """Start guiding a sequence after its output so far."""
        import xgrammar

        thinking = sequence.sampling.thinking
        place = _Place.GUIDED if thinking is None else _Place.THINKING if thinking.open else _Place.FIRST
        sequence.guide = _Guide(xgrammar.GrammarMatcher(compiled), thinking, place)

    def mask(self, row: torch.Tensor, sequence: Sequence) -> None:
        """Mask in `row` [vocab] all tokens that violate the sequence's grammar. In reasoning, only the end of the
        output does, because the answer is still to come."""
        import xgrammar

        guide = self._guide(sequence)
        if guide.place is _Place.THINKING:
            row[list(self._tokens.stops)] = float("-inf")
            return
        begin = guide.thinking.begin if guide.thinking is not None and guide.place is _Place.FIRST else None
        kept = None if begin is None else row[begin].clone()
        if self._bitmask is None:
            self._bitmask = xgrammar.allocate_token_bitmask(1, self._tokens.vocab_size)
        if not guide.matcher.is_terminated() and guide.matcher.fill_next_token_bitmask(self._bitmask):
            xgrammar.apply_token_bitmask_inplace(row[None], self._bitmask.to(row.device))
        if begin is not None and kept is not None:
            row[begin] = kept

    def accept(self, sequence: Sequence, token_id: int) -> None:
        """Advance the grammar by the sequence's chosen token."""
        self._guide(sequence).advance(token_id)

    def close(self) -> None:
        """Stop the compiler processes."""
        self._compilers.close()

    def _guide(self, sequence: Sequence) -> _Guide:
        """The state of the grammar after the sequence's output so far."""
        guide = sequence.guide
        assert isinstance(guide, _Guide), "a guided sequence was added without its grammar"
        for token_id in sequence.token_ids[sequence.prompt_len + guide.accepted :]:
            guide.advance(token_id)
        return guide

    def _known(self, grammar: str) -> xgrammar.CompiledGrammar | None:
        with self._lock:
            if (found := self._compiled.get(grammar)) is not None:
                self._compiled.move_to_end(grammar)
            return found

    def _keep(self, grammar: str, data: bytes) -> xgrammar.CompiledGrammar:
        import xgrammar

        compiled = xgrammar.CompiledGrammar.deserialize_json(data.decode(), self._tokens.info)
        with self._lock:
            self._compiled[grammar] = compiled
            while len(self._compiled) > _MAX_GRAMMARS:
                self._compiled.popitem(last=False)
        return compiled


@dataclass
class _Tokens:
    """The vocabulary for which grammars are compiled."""

    model: Path | None
    vocab_size: int
    stops: tuple[int, ...]

    @property
    def argv(self) -> list[str]:
        """The command of a compiler process for this vocabulary."""
        words = ["--model", str(self.model or ""), "--vocab-size", str(self.vocab_size)]
        words += ["--stops", ",".join(map(str, self.stops)), "--parent", str(os.getpid())]
        return program.this_engine("grammars", *words)

    @cached_property
    def info(self) -> xgrammar.TokenizerInfo:
        """The tokenizer info for xgrammar. Raises BadGrammar if the model has no end token."""
        import xgrammar
        from transformers import PreTrainedTokenizerFast

        if self.model is None or not self.stops:
            raise BadGrammar("this model has no end token, without which a guided output cannot end")
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(self.model / "tokenizer.json"))
        return xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=self.vocab_size, stop_token_ids=list(self.stops)
        )


def main(argv: list[str]) -> int:
    """`python -m pdctl.engine grammars`: a compiler process of an engine's core."""
    parser = argparse.ArgumentParser(prog="python -m pdctl.engine grammars")
    parser.add_argument("--model", required=True)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--stops", required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args(argv)
    die_with_parent(signal.SIGKILL, options.parent)
    resource.setrlimit(resource.RLIMIT_DATA, (_MAX_MEMORY, _MAX_MEMORY))
    stops = tuple(int(word) for word in options.stops.split(",") if word)
    tokens = _Tokens(Path(options.model) if options.model else None, options.vocab_size, stops)
    serve(lambda grammar: compiled(tokens, grammar))
    return 0


def json_grammar(schema: object) -> xgrammar.Grammar:
    """The grammar of a checked and narrowed JSON Schema; True for any object.

    Strings with a length must not contain raw control characters, which JSON forbids but xgrammar 0.2.8 allows.
    """
    import xgrammar

    strict = schema is not True
    text = json.dumps(schema if strict else {"type": "object"})
    found = xgrammar.Grammar.from_json_schema(text, strict_mode=strict, max_whitespace_cnt=_MAX_BLANKS)
    rules = str(found)
    mended = rules.replace(_ANY_LETTER, _JSON_LETTER)
    return found if mended == rules else xgrammar.Grammar.from_ebnf(mended)


def compiled(tokens: _Tokens, grammar: str) -> bytes:
    """Compile a grammar. Raises BadGrammar."""
    import xgrammar

    wanted = json.loads(grammar)
    compiler = xgrammar.GrammarCompiler(tokens.info, max_threads=1, cache_enabled=False)
    try:
        if "regex" in wanted:
            found = compiler.compile_regex(wanted["regex"])
        elif "ebnf" in wanted:
            found = compiler.compile_grammar(wanted["ebnf"])
        else:
            found = compiler.compile_grammar(json_grammar(wanted["json"]))
    except (RuntimeError, ValueError) as failure:
        raise BadGrammar(str(failure).strip().splitlines()[0][:300]) from failure
    return found.serialize_json().encode()
