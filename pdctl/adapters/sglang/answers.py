"""Parsing SGLang's answers: errors in both of its shapes, ends, chats, loads. No I/O."""

from __future__ import annotations

import msgspec

from pdctl.adapters import CannotResume, Choice, Condition, EngineError, RequestState, Retelling, shown
from pdctl.net.openai.answers import Answer, ErrorBody, KnownChoice, first_choice, parse_answer

# How the scheduler begins the message of an error that is neither engine's fault: the KV did not arrive.
_KV_LOST = (
    "Decode handshake failed", "Decode transfer failed", "Prefill bootstrap failed", "Prefill transfer failed",
    "KV checksum mismatch", "Metadata unexpectedly not ready", "Metadata corruption detected",
)  # fmt: skip
# The fields of a chat's event that carry text.
_TEXTS = ("reasoning_content", "content")


class _Error(ErrorBody):
    """SGLang's error object. In a stream, `code` is its only status."""

    code: int | None = None


class _Refusal(msgspec.Struct):
    """An error answer: the object itself, or {"error": object}, or {"error": sentence} from the key check."""

    message: str | None = None
    type: str = "server_error"
    param: str | None = None
    error: _Error | str | None = None


class _Load(msgspec.Struct):
    num_used_tokens: int = 0
    max_total_num_tokens: int = 0
    max_running_requests: int = 0


class _Loads(msgspec.Struct):
    loads: list[_Load]


_decode_refusal = msgspec.json.Decoder(_Refusal).decode
_decode_loads = msgspec.json.Decoder(_Loads).decode
_decode_delta = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_text = msgspec.json.Decoder(str | None).decode
_encode = msgspec.json.Encoder().encode


def refusal(status: int, body: bytes) -> EngineError:
    """Parse an answer that is not usable. A status below 400 is not the error's: it is that of a stream's head."""
    try:
        found = _decode_refusal(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        found = _Refusal()
    error = found.error
    if isinstance(error, str):
        error = _Error(error)
    elif error is None:
        error = _Error(found.message or f"the engine answered with status {status}", found.type, found.param)
    code = status if status >= 400 else (error.code or 502)
    lost = error.type == "kv_lost" or error.message.startswith(_KV_LOST)
    return EngineError(max(400, code), error.message, error.type, lost, error.param)


def parse(body: bytes) -> Answer:
    """Parse an answer with status 200, or an event's data. Raises EngineError for errors, which may be in either."""
    try:
        return parse_answer(200, body)
    except EngineError as failure:
        # Only SGLang's own object has the status of an error in a stream.
        raise (failure if failure.kind == "bad_upstream" else refusal(200, body)) from None


def choice_of(answer: Answer) -> tuple[KnownChoice, Choice] | None:
    """The first choice, if there is one. Raises EngineError if it ends because someone aborted the request: then the
    answer is not complete."""
    try:
        found = first_choice(answer)
    except msgspec.DecodeError:
        raise EngineError(502, "the engine's answer has a malformed choice", "bad_upstream") from None
    if found is not None and found[0].finish_reason == "abort":
        raise EngineError(503, "the engine aborted the request", "aborted")
    return found


def new_in_chat(fields: Choice, state: RequestState) -> Choice | None:
    """The part of a chat's event that the client does not have; None if it has all of it. Raises CannotResume."""
    if state.told is None:
        state.told = Retelling()
    told, was_repeating = state.told, state.told.is_repeating
    try:
        delta = _decode_delta(fields.get("delta", b"{}"))
        texts = {name: _decode_text(delta[name]) for name in _TEXTS if name in delta}
    except msgspec.DecodeError:
        raise EngineError(502, "the engine's answer has a malformed delta", "bad_upstream") from None
    new = {name: told.add(name, text) for name, text in texts.items() if text}
    ends = bytes(fields.get("finish_reason", b"null")) != b"null"
    if ends and told.is_repeating:
        raise CannotResume("the engine failed, and the next engine gave a shorter answer")
    if was_repeating and not ends and not any(new.values()):
        return None
    changed = {name: msgspec.Raw(_encode(text)) for name, text in new.items()}
    return {**shown(fields, "token_ids", "prompt_token_ids"), "delta": msgspec.Raw(_encode({**delta, **changed}))}


def condition(status: int, body: bytes) -> Condition:
    """Parse the answer of /v1/loads. It lists no loads before the model is ready."""
    try:
        loads = _decode_loads(body).loads
    except (msgspec.DecodeError, UnicodeDecodeError):
        return Condition(usable=False)
    seats = sum(load.max_running_requests for load in loads)
    room = max((load.max_total_num_tokens - load.num_used_tokens for load in loads), default=0)
    return Condition(status == 200 and bool(loads), seats or None, max(0, room))
