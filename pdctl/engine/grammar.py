"""Output that must match a grammar: xgrammar compiles it, here it is kept in step with the tokens.

A grammar is worded as JSON: {"json": SCHEMA} (true for any object) or {"regex": PATTERN}. Where a sequence's grammar
stands is derived from its output tokens, so a request that moved to another engine goes on where it was.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pdctl.engine.compilers import BadGrammar, Compilers
from pdctl.engine.sequence import Sequence

if TYPE_CHECKING:
    import xgrammar

# Compiled grammars kept.
_MAX_GRAMMARS = 64


@dataclass(slots=True)
class _Guide:
    matcher: xgrammar.GrammarMatcher
    accepted: int


class Grammars:
    """Compiled in a thread of its own: no step waits for a compilation. `model`: a folder with tokenizer.json."""

    def __init__(self, model: Path | None, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self._stops = sorted(eos_token_ids)
        self._compiler: xgrammar.GrammarCompiler | None = None
        self._compiled: dict[str, xgrammar.CompiledGrammar] = {}
        self._bitmask: torch.Tensor | None = None
        self._lock = threading.Lock()
        self._compilers = Compilers()

    def prepare(self, grammar: str, is_wanted: Callable[[], bool], then: Callable[[str], None]) -> None:
        """Compile in the background, then call `then` with "" or the reason why not."""
        self._compilers.submit(partial(self._compile, grammar), grammar, is_wanted, then)

    def mask(self, row: torch.Tensor, sequence: Sequence) -> None:
        """Rule out in `row` [vocab] what would break the sequence's grammar."""
        import xgrammar

        guide = self._guide(sequence)
        if self._bitmask is None:
            self._bitmask = xgrammar.allocate_token_bitmask(1, self._vocab_size)
        if not guide.matcher.is_terminated() and guide.matcher.fill_next_token_bitmask(self._bitmask):
            xgrammar.apply_token_bitmask_inplace(row[None], self._bitmask.to(row.device))

    def accept(self, sequence: Sequence, token_id: int) -> None:
        """The sequence's next token was chosen."""
        guide = self._guide(sequence)
        guide.accepted += 1
        if not guide.matcher.is_terminated():
            guide.matcher.accept_token(token_id)

    def _guide(self, sequence: Sequence) -> _Guide:
        """Where the grammar stands after the sequence's output so far."""
        import xgrammar

        guide = sequence.guide
        if not isinstance(guide, _Guide):
            grammar = sequence.sampling.grammar
            # Compiled before the sequence began, unless many others were since.
            guide = _Guide(xgrammar.GrammarMatcher(self._compile(grammar)), 0)
            sequence.guide = guide
        for token_id in sequence.token_ids[sequence.prompt_len + guide.accepted :]:
            guide.accepted += 1
            if not guide.matcher.is_terminated():
                guide.matcher.accept_token(token_id)
        return guide

    def _compile(self, grammar: str) -> xgrammar.CompiledGrammar:
        with self._lock:
            found = self._compiled.get(grammar)
        if found is None:
            # Not under the lock: a step that needs another grammar does not wait for this one.
            found = self._compiled_anew(grammar)
            with self._lock:
                while len(self._compiled) >= _MAX_GRAMMARS:
                    self._compiled.pop(next(iter(self._compiled)))
                self._compiled[grammar] = found
        return found

    def _compiled_anew(self, grammar: str) -> xgrammar.CompiledGrammar:
        wanted = json.loads(grammar)
        compiler = self._compiler = self._compiler or self._new_compiler()
        try:
            if "regex" in wanted:
                return compiler.compile_regex(wanted["regex"])
            if wanted["json"] is True:
                return compiler.compile_builtin_json_grammar()
            return compiler.compile_json_schema(json.dumps(wanted["json"]))
        except (RuntimeError, ValueError) as failure:
            raise BadGrammar(str(failure).strip().splitlines()[0][:300]) from failure

    def _new_compiler(self) -> xgrammar.GrammarCompiler:
        import xgrammar
        from transformers import PreTrainedTokenizerFast

        if self._model is None or not self._stops:
            raise BadGrammar("this model has no end token, without which a guided output cannot end")
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(self._model / "tokenizer.json"))
        info = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=self._vocab_size, stop_token_ids=self._stops
        )
        return xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
