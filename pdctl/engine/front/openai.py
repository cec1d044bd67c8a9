"""OpenAI requests, checked before anything is computed."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import msgspec

from pdctl.engine.messages import Sampling
from pdctl.openai_api import ApiError, Envelope, field_of
from pdctl.wire import HandOver, Port

_MAX_STOPS = 16


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """`include_usage` adds a last chunk with the counts."""

    include_usage: bool = False


class OfferTo(msgspec.Struct, frozen=True):
    """The decode engine that may read the first chunks while the last ones are computed."""

    host: str
    port: Port


class HoldRequest(msgspec.Struct):
    """`kv_transfer_params` sent to a prefill engine, in vLLM's words plus `offer_to`."""

    do_remote_decode: bool = False
    do_remote_prefill: bool = False
    offer_to: OfferTo | None = None


class _Common(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What completions and chat completions share. The last block is refused unless neutral."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"null")
    resume_token_ids: list[int] | None = None

    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None

    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None


class CompletionBody(_Common, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[int | str | list[int]]
    max_tokens: int | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class ChatBody(_Common, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[dict[str, object]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: dict[str, object] | None = None
    tools: list[dict[str, object]] | None = None
    tool_choice: str | dict[str, object] | None = None
    parallel_tool_calls: bool | None = None


# Fields that change the output and that this engine does not do: any value but these is refused, never ignored.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "logit_bias": (None, {}),
    "best_of": (None, 1),
    "echo": (None, False),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "suffix": (None, ""),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
}


@dataclass(slots=True)
class GenerationRequest:
    """One checked request. `token_ids` is the prompt; `resume` are output tokens the client has already."""

    request_id: str
    envelope: Envelope
    token_ids: list[int]
    sampling: Sampling
    stops: list[str]
    stream: bool
    include_usage: bool
    resume: list[int]
    hold: bool
    hand_over: HandOver | None
    offer_to: OfferTo | None = None
    router: str = "router"
    attempt: str = ""


def parse_body(body: bytes, chat: bool) -> CompletionBody | ChatBody:
    """Decode and check what can be checked without a tokenizer. Raises ApiError."""
    try:
        kind: type[CompletionBody | ChatBody] = ChatBody if chat else CompletionBody
        parsed = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as failure:
        raise ApiError(400, str(failure), param=field_of(failure)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as failure:
        raise ApiError(400, f"the body is not valid JSON: {failure}") from None
    for name, neutral in _NEUTRAL.items():
        value = getattr(parsed, name, None)
        if not any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in neutral):
            raise ApiError(400, f"{name} is not supported by this engine", param=name)
    _check_numbers(parsed)
    return parsed


def _check_numbers(body: CompletionBody | ChatBody) -> None:
    checks: list[tuple[str, float | None, float, float]] = [
        ("temperature", body.temperature, 0.0, 100.0),
        ("top_p", body.top_p, 1e-9, 1.0),
        ("top_k", body.top_k, -1, 2**31),
        ("max_tokens", body.max_tokens, 1, 2**31),
        ("max_completion_tokens", getattr(body, "max_completion_tokens", None), 1, 2**31),
        ("seed", body.seed, -(2**63), 2**63 - 1),
    ]
    for name, value, low, high in checks:
        if value is not None and not low <= value <= high:
            bounds = f"at least {low:g}" if high >= 2**31 else f"from {low:g} to {high:g}"
            raise ApiError(400, f"{name} must be {bounds}; it is {value}", param=name)


def stop_strings(body: CompletionBody | ChatBody) -> list[str]:
    """The stop strings as a list. Raises ApiError."""
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > _MAX_STOPS or not all(stops):
        raise ApiError(400, f"stop takes up to {_MAX_STOPS} strings, none of them empty", param="stop")
    return stops


def sampling_of(body: CompletionBody | ChatBody, prompt_len: int, max_model_len: int) -> Sampling:
    """Sampling with OpenAI's defaults. Raises ApiError when prompt and output do not fit the context."""
    room = max_model_len - prompt_len
    if room < 1:
        raise ApiError(
            400,
            f"this model's context is {max_model_len} tokens, prompt and output together; the prompt alone has "
            f"{prompt_len}",
            param="messages" if isinstance(body, ChatBody) else "prompt",
        )
    wanted = getattr(body, "max_completion_tokens", None) or body.max_tokens
    if wanted is None:
        wanted = room if isinstance(body, ChatBody) else min(16, room)
    if wanted > room:
        raise ApiError(
            400,
            f"this model's context is {max_model_len} tokens; {prompt_len} in the prompt and {wanted} asked for "
            f"make {prompt_len + wanted}",
            param="max_tokens",
        )
    return Sampling(
        max_tokens=wanted,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        seed=secrets.randbits(63) if body.seed is None else body.seed % 2**64,
        ignore_eos=bool(body.ignore_eos),
    )
