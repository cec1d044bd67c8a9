"""Request bodies and answers of SGLang's OpenAI server (read in sglang 0.5.23).

A pair gets the same request at once, with prefill's bootstrap address and a room. The room is a number that only this
attempt uses; both engines compare it before any KV is used. Prefill answers when decode has the KV, so its answer is
ignored, but its failure is not.

A completion continues by token ids: exactly if sampling is greedy. SGLang binds seeds to positions only with
--enable-deterministic-inference; otherwise it ignores them, and the rest is sampled anew. What is refused would
count or match only the new output: see `_NOT_CONTINUED`; unlike vLLM's, SGLang's repetition_penalty is among them.

A chat cannot continue by token ids, because SGLang refuses return_token_ids for a streamed chat. It is repeated
(see `Retelling`) if it is greedy and its events have only text.
"""

from __future__ import annotations

import hashlib

import msgspec

from pdctl.adapters import (
    Attempt,
    Call,
    Choice,
    Condition,
    Delta,
    EngineError,
    Fields,
    HandShake,
    Pairing,
    Prefilled,
    RequestState,
    Tokenizer,
    shown,
    stream_fields,
    without,
)
from pdctl.adapters.sglang import answers
from pdctl.adapters.tokenizer import parse_tokens, tokenize_call
from pdctl.net.openai.answers import whole_counts
from pdctl.net.openai.api import Counts
from pdctl.proxy_wire import EngineAddress

# SGLang's default of --disaggregation-bootstrap-port, for an attached engine.
BOOTSTRAP_PORT = 8998
# Fields with which a router addresses SGLang: only the proxy sets them.
_ROUTERS = (
    "rid", "bootstrap_host", "bootstrap_port", "bootstrap_room", "disagg_prefill_dp_rank", "routed_dp_rank",
    "data_parallel_rank",
)  # fmt: skip
# Fields with which a completion cannot continue, unless they have no effect.
_NOT_CONTINUED = (
    "logprobs", "stop", "stop_regex", "presence_penalty", "frequency_penalty", "repetition_penalty", "echo", "suffix",
    "response_format", "json_schema", "regex", "ebnf", "custom_logit_processor", "watermark", "session_id",
    "session_params", "return_hidden_states", "return_routed_experts",
)  # fmt: skip
# The same for a chat, which is repeated from its beginning: its events must have only text.
_NOT_REPEATED = (
    "tools", "functions", "logprobs", "top_logprobs", "session_id", "session_params", "return_hidden_states",
    "return_routed_experts", "custom_logit_processor",
)  # fmt: skip
# Fields that decide about the tokens of a prompt.
_PROMPT = (
    "model", "prompt", "messages", "tools", "tool_choice", "reasoning_effort", "continue_final_message",
    "chat_template_kwargs", "add_special_tokens",
)  # fmt: skip
_SAYS_NOTHING = (b"null", b"[]", b'""', b"false", b"{}")
# Values of penalties without effect.
_NEUTRAL = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}

_encode = msgspec.json.Encoder().encode


class SglangDialect:
    """Request bodies and answers of SGLang."""

    hand_shake = HandShake.CONCURRENT
    # From shared memory: it answers during a long step, unlike /health, which waits at least a second for a token.
    probe_path = "/v1/loads?include=core"
    keys_by_request_id = False
    own_envelopes = True
    resumes_at_text = True
    deterministic = False
    # Prefill writes into memory that decode reserved for this room, and decode waits until it has said that it is done.
    verifies_leases = True
    tells_pieces = False
    tokenizer: Tokenizer | None = Tokenizer(lambda state: tokenize_call(state, _PROMPT), parse_tokens)
    # An engine of a pair answers nothing without a room, and a hybrid engine has none.
    pairing = Pairing(alone=frozenset({"hybrid"}), one_token_alone=False, hybrids_pair=False)

    def known_fields(self, path: str) -> frozenset[str] | None:
        """See Dialect.known_fields. They differ between versions of SGLang."""
        return None

    def client_ready(self, state: RequestState) -> bool:
        """See Dialect.client_ready. The events of chats are compared with what the client has, one by one."""
        return not state.chat and not state.emitted

    def cannot_resume(self, state: RequestState) -> str:
        """See Dialect.cannot_resume."""
        if not state.chat and not state.prompt_ids:
            return "the engine did not return the prompt's token ids: this needs an SGLang with return_token_ids"
        refused = _NOT_REPEATED if state.chat else _NOT_CONTINUED
        if found := next((name for name in refused if _says(state.fields, name)), None):
            return f"an SGLang request with {found} cannot continue after its engine failed"
        if state.chat and not _is_greedy(state.fields):
            return "an SGLang chat can continue after its engine failed only with temperature 0: it has no token ids"
        return ""

    def prefill_call(self, state: RequestState, attempt: Attempt) -> Call:
        """See Dialect.prefill_call. Prefill stops after one token itself."""
        path, fields = _asked(state)
        return Call(path, _encode({**fields, **_meeting(attempt), "rid": attempt.name, "stream": False}))

    def decode_call(self, state: RequestState, attempt: Attempt, hand_over: bytes | None, stream: bool) -> Call:
        """See Dialect.decode_call."""
        path, fields = _asked(state)
        extra: Fields = {"rid": attempt.name, "stream": stream}
        if stream:
            extra |= _chat_fields() if state.chat else stream_fields(state)
        if attempt.prefill != attempt.decode:
            extra |= _meeting(attempt)
        return Call(path, _encode({**fields, **extra}))

    def ending(self, state: RequestState) -> Choice | None:
        """See Dialect.ending. A chat is repeated up to its end."""
        if state.chat or len(state.emitted) < _limit(state):
            return None
        parts = {"text": b'""', "logprobs": b"null", "finish_reason": b'"length"'}
        return {name: msgspec.Raw(value) for name, value in parts.items()}

    def parse_error(self, status: int, body: bytes) -> EngineError:
        """See Dialect.parse_error."""
        return answers.refusal(status, body)

    def parse_prefill(self, body: bytes, state: RequestState) -> Prefilled:
        """See Dialect.parse_prefill. Decode sends the complete answer."""
        answer = answers.parse(body)
        answers.choice_of(answer)
        return Prefilled([], {}, None, answer.prompt_tokens, None, cached_tokens=answer.cached_tokens)

    def parse_event(self, data: bytes, state: RequestState) -> Delta:
        """See Dialect.parse_event."""
        answer = answers.parse(data)
        found = answers.choice_of(answer)
        if found is None:
            return Delta([], None, None, answer.counts)
        known, fields = found
        if state.chat:
            return Delta([], answers.new_in_chat(fields, state), known.finish_reason, answer.counts)
        choice = shown(fields, "token_ids", "prompt_token_ids")
        return Delta(known.token_ids or [], choice, known.finish_reason, answer.counts, known.prompt_token_ids)

    def parse_whole(self, body: bytes) -> Counts:
        """See Dialect.parse_whole."""
        answers.choice_of(answers.parse(body))
        return whole_counts(body)

    def parse_condition(self, status: int, body: bytes) -> Condition:
        """See Dialect.parse_condition."""
        return answers.condition(status, body)

    def give_up_call(self, attempt: str) -> Call | None:
        """See Dialect.give_up_call. Without it, prefill keeps the KV until its bootstrap timeout."""
        return _abort(attempt)

    def give_up_decode_call(self, attempt: str) -> Call | None:
        """See Dialect.give_up_decode_call. SGLang notices the end of a connection only seconds later."""
        return _abort(attempt)

    def move_call(self, attempt: str, to: EngineAddress) -> Call | None:
        """See Dialect.move_call. Its streams end where they began."""
        return None

    def release_call(self, hand_over: bytes) -> Call | None:
        """See Dialect.release_call. There is no hand-over to release."""
        return None


DIALECT = SglangDialect()


def room_of(attempt: str) -> int:
    """The room of an attempt: 63 bits, never 0, which decode takes for KV that has not arrived."""
    digest = hashlib.blake2b(attempt.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1 or 1


def _meeting(attempt: Attempt) -> Fields:
    """Where the two engines of an attempt meet."""
    port = attempt.prefill.ports.get("bootstrap", BOOTSTRAP_PORT)
    return {"bootstrap_host": attempt.prefill.host, "bootstrap_port": port, "bootstrap_room": room_of(attempt.name)}


def _chat_fields() -> Fields:
    # The counts of each event are the only measure of a chat's tokens.
    return {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}


def _abort(rid: str) -> Call:
    return Call("/abort_request", _encode({"rid": rid, "abort_all": False}))


def _asked(state: RequestState) -> tuple[str, Fields]:
    """The original request, or the rest of a completion after the tokens that the client has."""
    fields = without(state.fields, *_ROUTERS)
    if state.chat:
        return state.path, fields
    if "max_completion_tokens" in fields:
        # SGLang's completions ignore it, and would stop after the default of 16.
        fields = {**without(fields, "max_completion_tokens"), "max_tokens": _limit(state)}
    if not state.emitted:
        return state.path, fields
    assert state.prompt_ids, "a request that cannot resume must not be sent"
    assert not state.held, "tokens without text must be taken back before a request continues"
    count, limit, least = len(state.emitted), _limit(state), _number(state.fields, "min_tokens")
    assert limit > count, "a complete answer must not be continued"
    rest: Fields = {"prompt": [*state.prompt_ids, *state.emitted], "max_tokens": limit - count}
    if least:
        rest["min_tokens"] = max(0, least - count)
    return state.path, {**fields, **rest}


def _is_greedy(fields: Fields) -> bool:
    return _number(fields, "temperature") == 0 or _number(fields, "top_k") == 1


def _says(fields: Fields, name: str) -> bool:
    value = fields.get(name)
    if not isinstance(value, msgspec.Raw):
        return value is not None
    return bytes(value) not in _SAYS_NOTHING and not (name in _NEUTRAL and _number(fields, name) == _NEUTRAL[name])


def _limit(state: RequestState) -> int:
    """Maximum number of output tokens of a completion. OpenAI's default is 16."""
    found = _number(state.fields, "max_completion_tokens") or _number(state.fields, "max_tokens")
    return int(found or 16)


def _number(fields: Fields, name: str) -> float | None:
    value = fields.get(name)
    found = msgspec.json.decode(value) if isinstance(value, msgspec.Raw) else value
    return found if isinstance(found, int | float) else None
