"""A request's growing output: token ids in; text, tool calls and log probabilities out, in OpenAI's format."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field, replace

import msgspec

from pdctl.engine.front.api.openai import GenerationRequest
from pdctl.engine.front.api.parsers import Parsers
from pdctl.engine.front.api.parsers.reasoning import ReasoningText, is_open, is_over
from pdctl.engine.front.api.parsers.tool_calls import ToolCall, ToolFormat, joined, tool_text, whole_calls
from pdctl.engine.front.api.text import OutputText, TextCodec
from pdctl.engine.front.api.token_text import text_of
from pdctl.engine.ipc.messages import Logprobs, PromptToken, Thinking
from pdctl.net.openai.api import DONE, Counts, usage
from pdctl.wire import TIMING_HEADER, HandOver

# Enough prompt tokens for the detokenizer to join the first output token to the prompt.
_PROMPT_TAIL = 8
# Enough prompt tokens for a mark that begins reasoning, with white space.
_MARK_TAIL = 32
# JSON has no infinity: the log probability reported for impossible tokens.
_LEAST_LOGPROB = -9999.0

Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class Piece:
    """The output of one step: token ids, the text that can be shown, and the finish reason if the output ended.

    `logprobs`: if requested, an entry per token id with its text and the text's offset; with an echo, the prompt's
    tokens come first. `prompt_logprobs`: vLLM's, with the first piece. `stop_reason`: as in vLLM, the stop string that
    ended the output. `thought`: reasoning, which comes before the text.
    """

    token_ids: list[int]
    text: str
    finish_reason: str | None
    hand_over: HandOver | None = None
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[Json] | None = None
    prompt_logprobs: list[Json | None] | None = None
    stop_reason: str | None = None
    thought: str = ""


class Output:
    """One request's output. Tokens that the client already has are replayed, so that the output continues after
    them."""

    def __init__(self, codec: TextCodec, parsers: Parsers, request: GenerationRequest) -> None:
        self._codec = codec
        self._request = request
        # A grammar from the first token on leaves no room for reasoning.
        has_room = not request.sampling.grammar or request.sampling.thinking is not None
        marks = parsers.marks if request.splits_reasoning and has_room else None
        family = parsers.family if request.tool_calls is ToolFormat.FREE else None
        self._hidden = codec.special_ids(
            ((marks.begin, marks.end) if marks else ()) + (family.markers if family else ())
        )
        self._token_text = codec.token_text
        self._chat = request.envelope.chat
        self._text = OutputText(
            codec.tokenizer, request.token_ids[-_PROMPT_TAIL:], request.stops, request.include_stop, self._hidden
        )
        begun = marks is not None and is_open(_tail(codec, request.token_ids), marks)
        self._reasoning = ReasoningText(marks, begun, family.openers if family else ())
        self._tools = tool_text(parsers.family, request.tool_calls, request.envelope.request_id, request.tools)
        self._wants_logprobs = request.logprobs >= 0
        # Where each token of the reasoning begins in the text.
        self._starts: list[int] = []
        self._echo = "" if request.resume else request.echo
        for token_id in request.resume:
            self._note_start()
            shown, _ = self._text.push(token_id)
            self._tools.push(self._reasoning.push(shown)[1])
        self._count_reasoning()

    def token(
        self,
        token_id: int,
        finish_reason: str | None,
        told: Logprobs | None = None,
        prompt: list[PromptToken] | None = None,
    ) -> Piece:
        """Add the next token; the first comes with the prompt's log probabilities. The piece has a finish_reason at the
        end."""
        offset = len(self._request.echo) + self._text.length
        self._note_start()
        shown, stopped = self._text.push(token_id)
        if stopped:
            finish_reason = "stop"
        elif finish_reason is not None:
            shown += self._text.flush()
        entries = [self._entry(token_id, told, offset)] if self._wants_logprobs and told else None
        piece = self._piece([token_id], shown, finish_reason, entries)
        return piece if prompt is None else self._with_prompt(piece, prompt)

    def end(self) -> Piece:
        """End the output without another token."""
        return self._piece([], self._text.flush(), "length", None)

    def _piece(self, token_ids: list[int], text: str, reason: str | None, entries: list[Json] | None) -> Piece:
        thought, text = self._reasoning.push(text)
        if reason is not None:
            more_thought, more_text = self._reasoning.flush()
            thought, text = thought + more_thought, text + more_text
        self._count_reasoning()
        shown, calls = self._tools.push(text)
        if reason is not None:
            rest, more = self._tools.flush()
            shown, calls = shown + rest, calls + more
            if self._tools.found and reason == "stop":
                reason = "tool_calls"
        if self._request.one_call:
            # As in vLLM: further calls are left out.
            calls = [call for call in calls if call["index"] == 0]
        for mark in self._hidden.values():
            # Of calls that are malformed. Answers never show special tokens.
            shown, thought = shown.replace(mark, ""), thought.replace(mark, "")
        if thought and not self._request.shows_reasoning:
            thought, entries = "", None
        shown, self._echo = self._echo + shown, ""
        stop = self._text.stop
        return Piece(token_ids, shown, reason, None, joined(calls), entries, stop_reason=stop, thought=thought)

    def _note_start(self) -> None:
        if self._reasoning.is_open:
            self._starts.append(self._text.length)

    def _count_reasoning(self) -> None:
        """Note how many tokens are reasoning, without the marks. Some of them may be held back as text."""
        first, last = self._reasoning.first, self._reasoning.last
        if first is not None:
            end = len(self._starts) if last is None else bisect_left(self._starts, last)
            self._request.reasoning = end - bisect_left(self._starts, first)

    def _with_prompt(self, piece: Piece, told: list[PromptToken]) -> Piece:
        body, ids = self._request, self._request.token_ids
        entries = piece.logprobs
        if entries is not None and body.echo and not self._chat:
            offsets = self._codec.offsets(ids)
            first: Json = {"token": self._named(ids[0], 0.0)["token"], "logprob": None, "top_logprobs": None}
            others = [
                self._entry(token, one.logprobs, at) for token, one, at in zip(ids[1:], told, offsets[1:], strict=True)
            ]
            entries = [{**first, "text_offset": offsets[0]}, *others, *entries]
        found: list[Json | None] | None = None
        if body.shows_prompt_logprobs:
            found = [None, *(self._vllm_entry(one) for one in told)]
        return replace(piece, logprobs=entries, prompt_logprobs=found)

    def _vllm_entry(self, one: PromptToken) -> Json:
        """An entry in vLLM's format: token ids as keys, the prompt's own token first."""
        (own, logprob), *top = one.logprobs
        found = {str(own): self._ranked(own, logprob, one.rank)}
        for rank, (token_id, likely) in enumerate(top, 1):
            found.setdefault(str(token_id), self._ranked(token_id, likely, rank))
        return dict(found)

    def _ranked(self, token_id: int, logprob: float, rank: int) -> Json:
        text = self._token_text.bytes_of(token_id).decode(errors="replace")
        return {"logprob": max(logprob, _LEAST_LOGPROB), "rank": rank, "decoded_token": text}

    def _entry(self, token_id: int, told: Logprobs, offset: int) -> Json:
        chosen, *top = told
        assert chosen[0] == token_id
        return {
            **self._named(*chosen),
            "top_logprobs": [self._named(*entry) for entry in top],
            "text_offset": offset,
        }

    def _named(self, token_id: int, logprob: float) -> Json:
        data = self._token_text.bytes_of(token_id)
        return {"token": text_of(data, self._chat), "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(data)}


def thinking(codec: TextCodec, parsers: Parsers, token_ids: list[int]) -> Thinking | None:
    """The reasoning that may come before guided output after this prompt. None if there is none, or if its marks are
    not single tokens, so that its end could not be told from the tokens."""
    marks = parsers.marks
    if marks is None:
        return None
    begin, end = (codec.tokenizer.token_to_id(mark) for mark in (marks.begin, marks.end))
    tail = _tail(codec, token_ids)
    if begin is None or end is None or is_over(tail, marks):
        return None
    return Thinking(begin, end, is_open(tail, marks))


def _tail(codec: TextCodec, token_ids: list[int]) -> str:
    return codec.decode(token_ids[-_MARK_TAIL:])


def for_chat(entries: list[Json] | None) -> Json | None:
    """OpenAI's `logprobs` of a chat's choice."""
    if entries is None:
        return None
    return {"content": [{name: entry[name] for name in entry if name != "text_offset"} for entry in entries]}


def for_completion(entries: list[Json] | None) -> Json | None:
    """OpenAI's `logprobs` of a completion's choice."""
    if entries is None:
        return None
    tops: list[Json | None] = []
    for entry in entries:
        top = entry["top_logprobs"]
        # A prompt's first token has no log probability.
        tops.append({other["token"]: other["logprob"] for other in (*top, entry)} if isinstance(top, list) else None)
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": tops,
        "text_offset": [entry["text_offset"] for entry in entries],
    }


def chunk_choice(piece: Piece, chat: bool, first: bool) -> Json:
    """A piece as a choice in a stream's event; the first one includes the role."""
    told: Json = {} if piece.prompt_logprobs is None else {"prompt_logprobs": piece.prompt_logprobs}
    told |= {} if piece.stop_reason is None else {"stop_reason": piece.stop_reason}
    if not chat:
        logprobs = for_completion(piece.logprobs)
        return {"logprobs": logprobs, "finish_reason": piece.finish_reason, **told, "text": piece.text}
    delta: Json = {"role": "assistant"} if first else {}
    if piece.thought:
        delta |= _reasoned(piece.thought)
    if piece.text or not (piece.calls or piece.thought):
        delta["content"] = piece.text
    if piece.calls:
        delta["tool_calls"] = piece.calls
    return {"logprobs": for_chat(piece.logprobs), "finish_reason": piece.finish_reason, **told, "delta": delta}


def whole_choice(pieces: list[Piece], chat: bool) -> Json:
    """All pieces as the choice of an unstreamed answer."""
    text = "".join(piece.text for piece in pieces)
    entries = [entry for piece in pieces for entry in piece.logprobs or []] or None
    reason = pieces[-1].finish_reason or "length"
    told: Json = {"prompt_logprobs": found} if (found := pieces[0].prompt_logprobs) is not None else {}
    told |= {} if (stop := pieces[-1].stop_reason) is None else {"stop_reason": stop}
    if not chat:
        return {"logprobs": for_completion(entries), "finish_reason": reason, **told, "text": text}
    calls = whole_calls([call for piece in pieces for call in piece.calls])
    message: Json = {"role": "assistant", "content": None if calls and not text else text}
    if thought := "".join(piece.thought for piece in pieces):
        message |= _reasoned(thought)
    if calls:
        message["tool_calls"] = calls
    return {"logprobs": for_chat(entries), "finish_reason": reason, **told, "message": message}


def _reasoned(thought: str) -> Json:
    """Reasoning under both of its names: vLLM's since 0.12, and the one before, which most clients look for."""
    return {"reasoning": thought, "reasoning_content": thought}


def stream_end(request: GenerationRequest, piece: Piece, count: int) -> bytes:
    """The bytes after the last event, sent in the same write; empty if more events follow. `count`: new tokens so far.
    The end of a stream that goes on elsewhere is its hand-over."""
    if piece.hand_over is not None:
        return b"data: " + msgspec.json.encode({"kv_transfer_params": piece.hand_over}) + b"\n\n" + DONE
    if piece.finish_reason is None:
        return b""
    counts = request.envelope.usage_chunk(usage_of(request, count)) if request.include_usage else b""
    return counts + DONE


def usage_of(request: GenerationRequest, new_tokens: int) -> dict[str, object]:
    """Token counts of the request, including resumed tokens."""
    output = new_tokens + len(request.resume)
    return usage(Counts(len(request.token_ids), output, request.cached, request.reasoning))


def timed(request: GenerationRequest) -> list[tuple[bytes, bytes]]:
    """The time of the KV transfer, as a header for the proxy."""
    if not request.stages:
        return []
    said = ",".join(f"{name}={value:.6g}" for name, value in request.stages.items())
    return [(TIMING_HEADER.encode(), said.encode())]
