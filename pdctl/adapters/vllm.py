"""vLLM's OpenAI server with a pull connector (NixlConnector), attached by URL.

Prefill is asked for one token, which is thrown away, and answers with `kv_transfer_params` that go to decode as they
are. vLLM has no way to resume: after a failure the prompt and the tokens so far are sent to /v1/completions as token
ids, which goes on exactly where sampling is greedy. Its seeds are not bound to positions, so a seeded request that was
cut goes on with other draws than it would have made. What cannot be continued so is refused, never guessed: tools,
logprobs, guided output, stop strings (their beginning may be held back), presence and frequency penalties (they look at
the output alone, which is prompt then). An answer cut within a character goes on from the token before that character.
"""

from __future__ import annotations

import msgspec

from pdctl.adapters import (
    Call,
    CannotResume,
    Choice,
    Condition,
    Delta,
    EngineError,
    Fields,
    Prefilled,
    RequestState,
    shown,
    stream_fields,
    without,
)
from pdctl.wire import EngineAddress

_HIDDEN = ("token_ids", "prompt_token_ids")
# Fields of a chat that mean the same to /v1/completions.
_SAMPLING = (
    "model", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "priority",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "skip_special_tokens",
    "include_stop_str_in_output", "spaces_between_special_tokens",
)  # fmt: skip
# Fields with which a request cannot go on, unless they say nothing.
_NOT_CONTINUED = (
    "tools", "logprobs", "top_logprobs", "stop", "presence_penalty", "frequency_penalty", "echo", "suffix",
    "prompt_logprobs", "response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "structured_outputs",
)  # fmt: skip
_SAYS_NOTHING = (b"null", b"[]", b'""', b"false", b"0.0")


class _Choice(msgspec.Struct):
    text: str | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Error(msgspec.Struct):
    message: str = "the engine failed without a message"
    type: str = "server_error"
    param: str | None = None


class _Answer(msgspec.Struct):
    choices: list[msgspec.Raw] = []
    usage: _Usage | None = None
    prompt_token_ids: list[int] | None = None
    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"null")
    error: _Error | None = None


_encode = msgspec.json.Encoder().encode
_decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_choice = msgspec.json.Decoder(_Choice).decode
_decode_fields = msgspec.json.Decoder(Choice).decode

_HOLD: Fields = {
    "stream": False,
    "max_tokens": 1,
    "kv_transfer_params": {
        "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
        "remote_host": None, "remote_port": None,
    },
}  # fmt: skip


class VllmDialect:
    """Bodies and answers of vLLM."""

    probe_path = "/health"
    keys_by_request_id = True
    own_envelopes = True
    resumes_at_text = True

    def known_fields(self, path: str) -> frozenset[str] | None:
        """See Dialect.known_fields. Each version of vLLM knows others, and says itself what it ignores."""
        return None

    def client_ready(self, state: RequestState) -> bool:
        """See Dialect.client_ready. A continuation is a completion to it, whatever the client asked."""
        return not state.emitted

    def prefill_call(self, state: RequestState, decode: EngineAddress) -> Call:
        """See Dialect.prefill_call."""
        path, fields = _continued(state)
        hold = {**_HOLD, "max_completion_tokens": 1} if "max_completion_tokens" in fields else _HOLD
        return Call(path, _encode({**without(fields, "min_tokens"), **hold}))

    def decode_call(self, state: RequestState, hand_over: bytes | None, stream: bool) -> Call:
        """See Dialect.decode_call."""
        path, fields = _continued(state)
        extra: Fields = {"stream": stream}
        if stream:
            extra |= stream_fields(state)
        if hand_over is not None:
            extra["kv_transfer_params"] = msgspec.Raw(hand_over)
        return Call(path, _encode({**fields, **extra}))

    def ending(self, state: RequestState) -> Choice | None:
        """See Dialect.ending."""
        if len(state.emitted) < (_limit(state) or len(state.emitted) + 1):
            return None
        reason = msgspec.Raw(b'"length"')
        return {"delta": msgspec.Raw(b"{}"), "finish_reason": reason} if state.chat else {
            "text": msgspec.Raw(b'""'), "logprobs": msgspec.Raw(b"null"), "finish_reason": reason,
        }  # fmt: skip

    def parse_prefill(self, status: int, body: bytes, state: RequestState) -> Prefilled:
        """See Dialect.parse_prefill. Its token is thrown away: decode samples it again from the same logits."""
        answer = _parsed(status, body)
        held = bytes(answer.kv_transfer_params)
        if held == b"null":
            raise EngineError(502, "the prefill engine held no KV: has it a kv_transfer_config?", "bad_upstream")
        return Prefilled([], {}, None, answer.usage.prompt_tokens if answer.usage else 0, held)

    def parse_event(self, data: bytes, state: RequestState) -> Delta:
        """See Dialect.parse_event."""
        answer = _parsed(200, data)
        counts = (answer.usage.prompt_tokens, answer.usage.completion_tokens) if answer.usage else None
        if not answer.choices:
            return Delta([], None, None, counts)
        known, fields = _decode_choice(answer.choices[0]), shown(_decode_fields(answer.choices[0]), *_HIDDEN)
        if state.chat and "delta" not in fields:
            # A chat that goes on as a completion.
            fields = _as_chat(fields, known.text or "")
        prompt = known.prompt_token_ids or answer.prompt_token_ids
        return Delta(known.token_ids or [], fields, known.finish_reason, counts, prompt)

    def parse_whole(self, body: bytes) -> tuple[int, int]:
        """See Dialect.parse_whole."""
        answer = _parsed(200, body)
        if not answer.choices or answer.usage is None:
            raise EngineError(502, "the engine answered without choices or usage", "bad_upstream")
        return answer.usage.prompt_tokens, answer.usage.completion_tokens

    def parse_condition(self, status: int, body: bytes) -> Condition:
        """See Dialect.parse_condition."""
        return Condition(usable=status == 200)

    def give_up_call(self, attempt: str) -> Call | None:
        """See Dialect.give_up_call. vLLM's leases end by its own clock."""
        return None

    def release_call(self, hand_over: bytes) -> Call | None:
        """See Dialect.release_call."""
        return None


def dialect() -> VllmDialect:
    """One per proxy process."""
    return VllmDialect()


def _as_chat(fields: Choice, text: str) -> Choice:
    """A completion's choice as a chat's."""
    delta = msgspec.Raw(_encode({"content": text}))
    return {**{name: value for name, value in fields.items() if name not in ("text", "logprobs")}, "delta": delta}


def _continued(state: RequestState) -> tuple[str, Fields]:
    """The request as it is, or what is left of it after the tokens the client has."""
    if not state.emitted:
        return state.path, state.fields
    if not state.prompt_ids:
        raise CannotResume("the engine did not tell its prompt's token ids: vLLM 0.10.2 or later does")
    if found := next((name for name in _NOT_CONTINUED if _says(state.fields, name)), None):
        raise CannotResume(f"a vLLM request with {found} cannot go on after its engine failed")
    assert not state.held, "taken back before it goes on"
    fields = {name: state.fields[name] for name in _SAMPLING if name in state.fields}
    count, limit, least = len(state.emitted), _limit(state), _number(state.fields, "min_tokens")
    if limit:
        assert limit > count, "an answer that is whole asks for nothing more"
        fields["max_tokens"] = limit - count
    if least:
        fields["min_tokens"] = max(0, least - count)
    return "/v1/completions", {**fields, "prompt": [*state.prompt_ids, *state.emitted]}


def _says(fields: Fields, name: str) -> bool:
    value = fields.get(name)
    if not isinstance(value, msgspec.Raw):
        return value is not None
    said = bytes(value)
    return said not in _SAYS_NOTHING and not (said == b"0" and name.endswith("penalty"))


def _limit(state: RequestState) -> int | None:
    """Output tokens at most; completions have OpenAI's default of 16."""
    found = _number(state.fields, "max_completion_tokens") or _number(state.fields, "max_tokens")
    return found or (None if state.chat else 16)


def _number(fields: Fields, name: str) -> int | None:
    value = fields.get(name)
    found = msgspec.json.decode(value) if isinstance(value, msgspec.Raw) else value
    return found if isinstance(found, int) else None


def _parsed(status: int, body: bytes) -> _Answer:
    try:
        answer = _decode_answer(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as failure:
        raise EngineError(502, f"the engine's answer is not what was agreed: {failure}", "bad_upstream") from None
    if status >= 400 or answer.error:
        error = answer.error or _Error()
        raise EngineError(status if status >= 400 else 500, error.message, error.type, param=error.param)
    return answer
