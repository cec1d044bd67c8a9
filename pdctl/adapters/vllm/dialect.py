"""Request bodies and answers of vLLM's OpenAI server.

With a pull connector (NixlConnector), the prefill call requests one token, which is discarded. Its answer has
`kv_transfer_params`, which go to decode unchanged. With a store, decode gets the client's request: see
VllmStoreDialect.

vLLM cannot resume a request: after a failure, the proxy sends the prompt and the tokens so far to
/v1/completions as token ids. That continues exactly if sampling is greedy. vLLM's seeds are not bound to positions, so
an interrupted request with a seed continues with different samples. Requests that cannot continue this way are refused:
those with tools, logprobs, guided output, stop strings (vLLM may have held back the start of one), presence or
frequency penalties (they count output tokens only, and the earlier output is then part of the prompt). If the answer
was cut within a character, it continues from the token before that character.
"""

from __future__ import annotations

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
from pdctl.adapters.tokenizer import parse_tokens, tokenize_call
from pdctl.adapters.vllm.connectors import CONNECTORS
from pdctl.net.openai.answers import first_choice, parse_answer, refusal, whole_counts
from pdctl.net.openai.api import Counts
from pdctl.proxy_wire import EngineAddress

_HIDDEN = ("token_ids", "prompt_token_ids")
# Fields of a chat that have the same meaning at /v1/completions.
_SAMPLING = (
    "model", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "priority",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "skip_special_tokens",
    "include_stop_str_in_output", "spaces_between_special_tokens",
)  # fmt: skip
# Fields with which a request cannot continue, unless they have no effect.
_NOT_CONTINUED = (
    "tools", "logprobs", "top_logprobs", "stop", "presence_penalty", "frequency_penalty", "echo", "suffix",
    "prompt_logprobs", "response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "structured_outputs",
)  # fmt: skip
# Fields that decide about the tokens of a prompt.
_PROMPT = (
    "model", "prompt", "messages", "tools", "add_special_tokens", "add_generation_prompt", "continue_final_message",
    "chat_template", "chat_template_kwargs", "mm_processor_kwargs",
)  # fmt: skip
_SAYS_NOTHING = (b"null", b"[]", b'""', b"false", b"0.0")


_encode = msgspec.json.Encoder().encode
# The hand-over of a prefill that put its KV into a store.
_DONE = b"null"

# Fields with which NixlConnector keeps the KV of a prompt for another engine.
_HOLD: Fields = {
    "stream": False,
    "max_tokens": 1,
    "kv_transfer_params": {
        "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
        "remote_host": None, "remote_port": None,
    },
}  # fmt: skip


class VllmDialect:
    """Request bodies and answers of vLLM."""

    hand_shake = HandShake.SEQUENTIAL
    probe_path = "/health"
    keys_by_request_id = True
    own_envelopes = True
    resumes_at_text = True
    deterministic = False
    pairing = Pairing()
    verifies_leases = False
    tells_pieces = False
    tokenizer: Tokenizer | None = Tokenizer(lambda state: tokenize_call(state, _PROMPT), parse_tokens)

    def known_fields(self, path: str) -> frozenset[str] | None:
        """See Dialect.known_fields. They differ between versions of vLLM, and vLLM reports which ones it ignores."""
        return None

    def client_ready(self, state: RequestState) -> bool:
        """See Dialect.client_ready. A continuation is a completion, even if the client requested a chat."""
        return not state.emitted

    def cannot_resume(self, state: RequestState) -> str:
        """See Dialect.cannot_resume."""
        if not state.prompt_ids:
            return "the engine did not return the prompt's token ids: this needs vLLM 0.10.2 or later"
        if state.reasoned:
            # The continuation is a completion: its text would appear as content.
            return "a vLLM chat with reasoning cannot continue after its engine failed"
        if found := next((name for name in _NOT_CONTINUED if _says(state.fields, name)), None):
            return f"a vLLM request with {found} cannot continue after its engine failed"
        return ""

    def prefill_call(self, state: RequestState, attempt: Attempt) -> Call:
        """See Dialect.prefill_call."""
        return _prompt_only(state, _HOLD)

    def decode_call(self, state: RequestState, attempt: Attempt, hand_over: bytes | None, stream: bool) -> Call:
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

    def parse_error(self, status: int, body: bytes) -> EngineError:
        """See Dialect.parse_error."""
        return _with_cause(refusal(status, body))

    def parse_prefill(self, body: bytes, state: RequestState) -> Prefilled:
        """See Dialect.parse_prefill. The token is discarded: decode samples it again from the same logits."""
        answer = parse_answer(200, body)
        held = bytes(answer.kv_transfer_params)
        if held == b"null":
            raise EngineError(502, "the prefill engine kept no KV: check its kv_transfer_config", "bad_upstream")
        return Prefilled([], {}, None, answer.prompt_tokens, held, cached_tokens=answer.cached_tokens)

    def parse_event(self, data: bytes, state: RequestState) -> Delta:
        """See Dialect.parse_event."""
        try:
            answer = parse_answer(200, data)
        except EngineError as failure:
            raise _with_cause(failure) from None
        found = first_choice(answer)
        if found is None:
            return Delta([], None, None, answer.counts)
        known, fields = found[0], shown(found[1], *_HIDDEN)
        if state.chat and "delta" not in fields:
            # A chat that continues as a completion.
            fields = _as_chat(fields, known.text or "")
        prompt = known.prompt_token_ids or answer.prompt_token_ids
        return Delta(known.token_ids or [], fields, known.finish_reason, answer.counts, prompt)

    def parse_whole(self, body: bytes) -> Counts:
        """See Dialect.parse_whole."""
        return whole_counts(body)

    def parse_condition(self, status: int, body: bytes) -> Condition:
        """See Dialect.parse_condition."""
        return Condition(usable=status == 200)

    def give_up_call(self, attempt: str) -> Call | None:
        """See Dialect.give_up_call. vLLM's leases end by its own timeout."""
        return None

    def give_up_decode_call(self, attempt: str) -> Call | None:
        """See Dialect.give_up_decode_call."""
        return None

    def move_call(self, attempt: str, to: EngineAddress) -> Call | None:
        """See Dialect.move_call. Its streams end where they began."""
        return None

    def release_call(self, hand_over: bytes) -> Call | None:
        """See Dialect.release_call."""
        return None


class VllmStoreDialect(VllmDialect):
    """vLLM with a store between prefill and decode (splitwise's form of P/D): prefill puts the prompt's KV into the
    store, and decode gets the request as the client sent it. It reads from the store what it finds there, and computes
    the rest. Keys name the tokens, so a late read never yields another request's KV.
    """

    verifies_leases = True

    def prefill_call(self, state: RequestState, attempt: Attempt) -> Call:
        """See Dialect.prefill_call."""
        return _prompt_only(state, {"stream": False, "max_tokens": 1})

    def decode_call(self, state: RequestState, attempt: Attempt, hand_over: bytes | None, stream: bool) -> Call:
        """See Dialect.decode_call. The hand-over says only that prefill is done."""
        return super().decode_call(state, attempt, None, stream)

    def parse_prefill(self, body: bytes, state: RequestState) -> Prefilled:
        """See Dialect.parse_prefill."""
        answer = parse_answer(200, body)
        return Prefilled([], {}, None, answer.prompt_tokens, _DONE, cached_tokens=answer.cached_tokens)


DIALECT = VllmDialect()
DIALECTS = {name: VllmStoreDialect() for name, connector in CONNECTORS.items() if not connector.pulls}


def _prompt_only(state: RequestState, hold: Fields) -> Call:
    """A call that computes the prompt and one token."""
    path, fields = _continued(state)
    # max_completion_tokens takes precedence over max_tokens. A min_tokens above the limit of 1 would be an error.
    limit: Fields = {"max_completion_tokens": 1} if "max_completion_tokens" in fields else {}
    return Call(path, _encode({**without(fields, "min_tokens"), **hold, **limit}))


def _with_cause(failure: EngineError) -> EngineError:
    """vLLM ends a request with this error if it could not read the KV: no engine has failed."""
    failure.kv_lost = failure.kv_lost or (failure.status == 500 and failure.message == "Internal server error")
    return failure


def _as_chat(fields: Choice, text: str) -> Choice:
    """Convert a completion's choice to a chat's."""
    delta = msgspec.Raw(_encode({"content": text}))
    return {**{name: value for name, value in fields.items() if name not in ("text", "logprobs")}, "delta": delta}


def _continued(state: RequestState) -> tuple[str, Fields]:
    """The original request, or the rest of it after the tokens that the client has."""
    if not state.emitted:
        return state.path, state.fields
    assert state.prompt_ids, "a request that cannot resume must not be sent"
    assert not state.held, "tokens without text must be taken back before a request continues"
    fields = {name: state.fields[name] for name in _SAMPLING if name in state.fields}
    count, limit, least = len(state.emitted), _limit(state), _number(state.fields, "min_tokens")
    if limit:
        assert limit > count, "a complete answer must not be continued"
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
    """Maximum number of output tokens. Completions have OpenAI's default of 16."""
    found = _number(state.fields, "max_completion_tokens") or _number(state.fields, "max_tokens")
    return found or (None if state.chat else 16)


def _number(fields: Fields, name: str) -> int | None:
    value = fields.get(name)
    found = msgspec.json.decode(value) if isinstance(value, msgspec.Raw) else value
    return found if isinstance(found, int) else None
