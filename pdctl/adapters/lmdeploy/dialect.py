"""Request bodies and answers of LMDeploy's api_server, and of its DistServe hand-over.

Prefill computes one token and keeps the KV (`with_cache`, `preserve_cache`). Its answer has the token and the KV's
blocks, which go to decode as `migration_request`. Decode reads the KV, tells prefill over ZeroMQ that it may free it,
and sends the same token as its first one; so the proxy drops prefill's. The proxy frees the KV too: twice is harmless,
and nobody else does when decode has failed.

The KV is freed by the number of prefill's session. Engines of 0.12 to 0.18 do not tell it (LMDeploy #4967): there
`hand_over` names no session, and only a sweep frees the KV (see control.py).

No request of this kind resumes. Completions tell no token ids at all, and chats none of the prompt; without these, a
continuation is a guess.
"""

from __future__ import annotations

import re

import msgspec

from pdctl.adapters import (
    UNKNOWN_TOKEN,
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
    RoomProbe,
    shown,
    stream_fields,
    without,
)
from pdctl.adapters.lmdeploy.messages import TRANSFER, CacheFree, MigrationRequest, engine_id, kv_tokens
from pdctl.net.openai.api import Counts
from pdctl.proxy_wire import EngineAddress

# Later versions accept the fields of a hand-over only with this header (LMDeploy #4969).
_HEADERS = b"x-lmdeploy-distserve-proxy: pdctl\r\n"
_NO_SESSION = -1
_NUMBER = re.compile(r"[0-9]{1,18}", re.ASCII)
# OpenAI's default for completions. LMDeploy's is the room that the prompt leaves.
_DEFAULT_MAX_TOKENS = 16
_GAVE_UP = ("abort", "error")
_HOLD: Fields = {"max_tokens": 1, "stream": False, "with_cache": True, "preserve_cache": True}

# Fields with an effect in 0.18, and those that the proxy itself uses. LMDeploy ignores all others silently.
_COMMON = frozenset({
    "model", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "n", "best_of", "stream", "stream_options",
    "max_tokens", "max_completion_tokens", "logprobs", "repetition_penalty", "repetition_ngram_size",
    "repetition_ngram_threshold", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "user",
    "priority", "return_token_ids",
})  # fmt: skip
_KNOWN = {
    "/v1/completions": _COMMON | {"prompt"},
    "/v1/chat/completions": _COMMON
    | {
        "messages", "tools", "tool_choice", "parallel_tool_calls", "top_logprobs", "logit_bias", "reasoning_effort",
        "response_format", "min_new_tokens", "min_tokens", "enable_thinking", "return_logprob",
        "include_stop_str_in_output", "chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs", "input_ids",
        "image_data", "return_routed_experts",
    },
}  # fmt: skip


class _HandOver(msgspec.Struct, frozen=True):
    """What prefill keeps: its session, the first token and the blocks of the KV."""

    session: int
    token: int
    blocks: list[int]


class _Error(msgspec.Struct):
    message: str = "the engine failed without a message"
    type: str = "server_error"
    code: int | str | None = None
    param: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None


class _Known(msgspec.Struct):
    """The fields of a choice that the proxy reads."""

    text: str | None = None
    delta: msgspec.Raw = msgspec.Raw(b"null")
    message: msgspec.Raw = msgspec.Raw(b"null")
    finish_reason: str | None = None
    output_ids: list[int] | None = None


class _Answer(msgspec.Struct):
    """An answer, an event of a stream, or LMDeploy's flat error: `object` is "error", or there is an `error_code`."""

    choices: list[msgspec.Raw] | None = None
    usage: _Usage | None = None
    id: str = ""
    object: str = ""
    message: str | None = None
    type: str = "server_error"
    code: int | str | None = None
    param: str | None = None
    error: _Error | None = None
    error_code: int | None = None
    text: str | None = None
    cache_block_ids: list[int] | None = None
    remote_token_ids: list[int] | None = None
    cache_session_id: int | None = None

    @property
    def failure(self) -> _Error | None:
        """The error that it is, or None."""
        if self.error is not None:
            return self.error
        if self.object == "error" or (self.choices is None and self.message is not None):
            return _Error(self.message or _Error().message, self.type, self.code, self.param)
        if self.error_code is not None:
            return _Error(f"{self.text or _Error().message} (error {self.error_code})", "server_error")
        return None

    @property
    def counts(self) -> Counts | None:
        """The token counts, if it has them."""
        return Counts(self.usage.prompt_tokens, self.usage.completion_tokens or 0) if self.usage else None


_encode = msgspec.json.Encoder().encode
_decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_known = msgspec.json.Decoder(_Known).decode
_decode_choice = msgspec.json.Decoder(Choice).decode
_decode_hand_over = msgspec.json.Decoder(_HandOver).decode


class LmdeployDialect:
    """Request bodies and answers of LMDeploy."""

    hand_shake = HandShake.OWNED
    probe_path = "/health"
    keys_by_request_id = False
    own_envelopes = True
    resumes_at_text = False
    deterministic = False
    # KV has no deadline here: see `room`.
    verifies_leases = True
    tells_pieces = False
    tokenizer = None
    pairing = Pairing(
        # A prefill engine ends every answer after one token, and a hybrid one never reads KV.
        alone=frozenset({"decode", "hybrid"}),
        hybrids_pair=False,
        prefill_must_finish=True,
        waits_forever=True,
        room=RoomProbe("/distserve/engine_info", kv_tokens),
    )

    def known_fields(self, path: str) -> frozenset[str] | None:
        """See Dialect.known_fields."""
        return _KNOWN.get(path)

    def client_ready(self, state: RequestState) -> bool:
        """See Dialect.client_ready. Its events leave fields out that clients need, and name token ids differently."""
        return False

    def cannot_resume(self, state: RequestState) -> str:
        """See Dialect.cannot_resume."""
        return "LMDeploy does not tell a prompt's token ids: an answer that has begun cannot continue on another engine"

    def prefill_call(self, state: RequestState, attempt: Attempt) -> Call:
        """See Dialect.prefill_call."""
        limit: Fields = {"max_completion_tokens": 1} if "max_completion_tokens" in state.fields else {}
        return Call(state.path, _encode({**_fields(state), **_HOLD, **limit}), _HEADERS)

    def decode_call(self, state: RequestState, attempt: Attempt, hand_over: bytes | None, stream: bool) -> Call:
        """See Dialect.decode_call."""
        extra: Fields = {"stream": stream}
        if stream:
            extra |= stream_fields(state)
        if hand_over is not None:
            held, prefill = _decode_hand_over(hand_over), attempt.prefill
            extra["migration_request"] = MigrationRequest(
                protocol=TRANSFER,
                remote_engine_id=engine_id(prefill.host, prefill.port),
                remote_session_id=held.session,
                remote_token_id=held.token,
                remote_block_ids=held.blocks,
            )
        return Call(state.path, _encode({**_fields(state), **extra}), _HEADERS)

    def ending(self, state: RequestState) -> Choice | None:
        """See Dialect.ending. Only the engine knows how many tokens it has sent."""
        return None

    def parse_error(self, status: int, body: bytes) -> EngineError:
        """See Dialect.parse_error."""
        failure = _failure_of(body)
        if status == 401:
            return EngineError(502, "the engine refuses pdctl's key: check its secret_file", "bad_upstream")
        if failure is None:
            # A prefill of 0.18 answers so when the first token ends the answer. One engine can compute it alone.
            lost = status >= 500
            message = f"the engine answered with status {status} and no reason"
            return EngineError(status if status >= 400 else 502, message, "server_error", kv_lost=lost)
        return EngineError(status if status >= 400 else 502, failure.message, failure.type, param=failure.param)

    def parse_prefill(self, body: bytes, state: RequestState) -> Prefilled:
        """See Dialect.parse_prefill. Decode sends the first token again, unless it ends the answer."""
        answer = _parse(body)
        known, choice = _choice(answer)
        blocks, tokens = answer.cache_block_ids, answer.remote_token_ids
        held = None if blocks is None else _encode(_HandOver(_session(answer), tokens[-1] if tokens else -1, blocks))
        prompt = answer.counts[0] if answer.counts else 0
        if known.finish_reason not in (None, "length"):
            if "message" in choice:
                choice["delta"] = choice.pop("message")
            ids = _tokens(known, choice)
            return Prefilled(ids, shown(choice, "output_ids"), known.finish_reason, prompt, None, held)
        if held is None or not tokens:
            raise EngineError(502, "the prefill engine kept no KV: start it with --role Prefill", "bad_upstream")
        return Prefilled([], {}, None, prompt, held)

    def parse_event(self, data: bytes, state: RequestState) -> Delta:
        """See Dialect.parse_event."""
        answer = _parse(data)
        if not answer.choices:
            return Delta([], None, None, answer.counts)
        known, choice = _choice(answer)
        # Clients expect the field in every event.
        choice.setdefault("finish_reason", msgspec.Raw(b"null"))
        return Delta(_tokens(known, choice), shown(choice, "output_ids"), known.finish_reason, answer.counts)

    def parse_whole(self, body: bytes) -> Counts:
        """See Dialect.parse_whole."""
        answer = _parse(body)
        _choice(answer)
        if answer.counts is None:
            raise EngineError(502, "the engine answered without usage", "bad_upstream")
        return answer.counts

    def parse_condition(self, status: int, body: bytes) -> Condition:
        """See Dialect.parse_condition."""
        return Condition(usable=status == 200)

    def give_up_call(self, attempt: str) -> Call | None:
        """See Dialect.give_up_call. A prefill call is not given up: see `pairing`."""
        return None

    def give_up_decode_call(self, attempt: str) -> Call | None:
        """See Dialect.give_up_decode_call. The engine notices that its client has gone."""
        return None

    def move_call(self, attempt: str, to: EngineAddress) -> Call | None:
        """See Dialect.move_call. Its streams end where they began."""
        return None

    def release_call(self, hand_over: bytes) -> Call | None:
        """See Dialect.release_call."""
        try:
            session = _decode_hand_over(hand_over).session
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        if session == _NO_SESSION:
            return None
        return Call("/distserve/free_cache", _encode(CacheFree("pdctl", session)), _HEADERS)


DIALECT = LmdeployDialect()


def _fields(state: RequestState) -> Fields:
    """The request in LMDeploy's words. A session that a client names could end another request's."""
    fields = without(state.fields, "session_id", "min_tokens", "best_of", "priority")
    if state.chat and "min_tokens" in state.fields:
        fields.setdefault("min_new_tokens", state.fields["min_tokens"])
    fields.setdefault("model", state.model)
    if not state.chat and not ({"max_tokens", "max_completion_tokens"} & fields.keys()):
        fields["max_tokens"] = _DEFAULT_MAX_TOKENS
    return fields


def _parse(body: bytes) -> _Answer:
    """An answer or an event. Raises EngineError for an error, whatever its HTTP status was."""
    try:
        answer = _decode_answer(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as malformed:
        raise EngineError(502, f"the engine's answer is malformed: {malformed}", "bad_upstream") from None
    if (failure := answer.failure) is not None:
        code = failure.code if isinstance(failure.code, int) and 400 <= failure.code < 600 else 500
        raise EngineError(code, failure.message, failure.type, param=failure.param)
    return answer


def _failure_of(body: bytes) -> _Error | None:
    try:
        return _decode_answer(body).failure
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _choice(answer: _Answer) -> tuple[_Known, Choice]:
    """The first choice, as the proxy reads it and as clients get it. Raises EngineError if the engine gave up."""
    if not answer.choices:
        raise EngineError(502, "the engine answered without choices", "bad_upstream")
    try:
        known, choice = _decode_known(answer.choices[0]), _decode_choice(answer.choices[0])
    except (msgspec.DecodeError, UnicodeDecodeError) as malformed:
        raise EngineError(502, f"the engine's answer is malformed: {malformed}", "bad_upstream") from None
    if known.finish_reason in _GAVE_UP:
        raise EngineError(500, f"the engine ended the answer with {known.finish_reason!r}", "server_error")
    return known, choice


def _session(answer: _Answer) -> int:
    """The session that holds the KV. Later versions tell it; up to 0.11 it is the answer's id."""
    if answer.cache_session_id is not None:
        return answer.cache_session_id if answer.cache_session_id >= 0 else _NO_SESSION
    return int(answer.id) if _NUMBER.fullmatch(answer.id) else _NO_SESSION


def _tokens(known: _Known, choice: Choice) -> list[int]:
    """The tokens of a choice. Completions do not tell them; then a choice with text counts as one."""
    if known.output_ids is not None:
        return known.output_ids
    part = bytes(choice.get("delta", b"null"))
    has_text = bool(known.text) or part not in (b"null", b"{}")
    return [UNKNOWN_TOKEN] if has_text else []
