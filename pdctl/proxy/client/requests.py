"""The parts of a client's request that the proxy reads. It has no tokenizer and leaves the rest to the engines.

A request may want several answers: `n` for one prompt, or one per prompt in a list. It is split into legs: ordinary
requests for one answer each, which are sent to engines.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from pdctl.net.openai.api import ApiError, Envelope, decode_request, shown_number
from pdctl.proxy.client.unknown_fields import UnknownFields

# Fields of hand-overs, of every kind: with these a client could read or free another request's KV.
_INTERNAL = (
    "kv_transfer_params", "resume_token_ids", "migration_request", "with_cache", "preserve_cache", "bootstrap_host",
    "bootstrap_port", "bootstrap_room",
)  # fmt: skip
# Limit of answers per request: OpenAI's limit of n.
MAX_LEGS = 128
_LEG_FIELDS = ("stream", "stream_options", "return_token_ids", "n")

_IGNORING = UnknownFields()

_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_prompts = msgspec.json.Decoder(list[msgspec.Raw]).decode
# Invalid in a list of prompts: a list of anything but numbers, or something that is neither a string nor a list.
_NOT_A_PROMPT = re.compile(rb'\[\s*[^\d\s\]-]|[^"\[]')


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


_STREAM_OPTIONS = frozenset(_StreamOptions.__struct_fields__)


class _Known(msgspec.Struct):
    """The fields that the proxy uses."""

    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    seed: int | None = None
    return_token_ids: bool | None = None
    n: int | None = None
    best_of: int | None = None
    prompt_logprobs: int | None = None
    echo: bool | None = None
    logprobs: int | bool | None = None
    priority: Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31)] | None = None


# Minimum values of fields; engines check the maximum.
_LEAST = {"max_tokens": 1, "max_completion_tokens": 1, "seed": -(2**63)}
_BOUNDED = tuple(_LEAST)

_decode_known = msgspec.json.Decoder(_Known).decode


@dataclass(slots=True)
class ClientRequest:
    """A request to relay, with one leg per answer. `size`: bytes of the body; `priority`: lower goes first.

    `counts_each`: every event of a stream carries the counts so far; `wants_prompt_logprobs`: includes log
    probabilities of the prompt; `ignored`: fields that were dropped; `seed`: of the first leg."""

    envelope: Envelope
    legs: list[dict[str, object]]
    size: int
    path: str
    stream: bool
    include_usage: bool
    counts_each: bool
    wants_prompt_logprobs: bool
    max_tokens: int | None
    priority: int
    ignored: list[str] = field(default_factory=list)
    body: bytes = b""
    seed: int = 0


def parse(
    body: bytes,
    path: str,
    chat: bool,
    request_id: str,
    served_model: str,
    unknown: UnknownFields = _IGNORING,
    engines_know: frozenset[str] | None = None,
    seed: int | None = None,
) -> ClientRequest:
    """Parse a request. `seed`: for one without a seed. Raises ApiError for errors that can be detected without an
    engine."""
    known, fields = _decoded(body)
    _check(known, fields, served_model)
    ignored = unknown.of(fields, engines_know)
    for name in ignored:
        del fields[name]
    if known.stream_options is not None:
        ignored += [
            f"stream_options.{name}" for name in unknown.of(_decode_fields(fields["stream_options"]), _STREAM_OPTIONS)
        ]
    # Choose a seed here if the client gave none, so that every engine samples the same tokens for this request.
    seed = known.seed if known.seed is not None else random.getrandbits(62) if seed is None else seed
    legs = _legs(fields, known, chat, seed)
    counts = bool(known.stream_options and known.stream_options.include_usage)
    return ClientRequest(
        envelope=Envelope(request_id, chat, served_model, bool(known.return_token_ids)),
        legs=legs,
        size=len(body),
        path=path,
        stream=bool(known.stream),
        include_usage=counts,
        counts_each=counts and bool(known.stream_options and known.stream_options.continuous_usage_stats),
        wants_prompt_logprobs=_wants_prompt_logprobs(known),
        max_tokens=_max_tokens(known, chat),
        priority=known.priority or 0,
        ignored=ignored,
        seed=seed,
    )


def check_encoding(body: bytes) -> None:
    """Raise ApiError 400 if a body is not UTF-8."""
    if not body.isascii():
        try:
            # Raw fields are forwarded without parsing, and not every engine checks their encoding.
            body.decode()
        except UnicodeDecodeError as failure:
            raise ApiError(400, f"the body is not valid JSON: {failure}") from None


def _decoded(body: bytes) -> tuple[_Known, dict[str, msgspec.Raw]]:
    check_encoding(body)
    return decode_request(_decode_known, body), decode_request(_decode_fields, body)


def _check(known: _Known, fields: dict[str, msgspec.Raw], served_model: str) -> None:
    for name in _INTERNAL:
        if name in fields:
            raise ApiError(400, f"{name} is reserved for this service's own processes", param=name)
    if known.model not in (None, served_model):
        message = f"the model {known.model!r} does not exist; this service serves {served_model!r}"
        raise ApiError(404, message, param="model")
    if known.stream_options is not None and not known.stream:
        raise ApiError(400, "stream_options needs stream = true", param="stream_options")
    if known.prompt_logprobs is not None and known.stream:
        raise ApiError(400, "prompt_logprobs is not supported with stream = true", param="prompt_logprobs")
    if known.n is not None and not 1 <= known.n <= MAX_LEGS:
        raise ApiError(400, f"n must be from 1 to {MAX_LEGS}; it is {shown_number(known.n)}", param="n")
    for name in _BOUNDED:
        value = getattr(known, name)
        if value is not None and not _LEAST[name] <= value < 2**63:
            message = f"{name} must be from {_LEAST[name]} to {2**63 - 1}; it is {shown_number(value)}"
            raise ApiError(400, message, param=name)
    if known.best_of is not None and known.best_of != (known.n or 1):
        raise ApiError(400, "best_of other than n is not supported", param="best_of")


def _wants_prompt_logprobs(known: _Known) -> bool:
    # 0 is a valid number of log probabilities and false means none, but they are equal in Python.
    wants_logprobs = known.logprobs is not None and known.logprobs is not False
    return known.prompt_logprobs is not None or (bool(known.echo) and wants_logprobs)


def _max_tokens(known: _Known, chat: bool) -> int | None:
    """The maximum tokens per answer, if given; completions have OpenAI's default of 16."""
    return known.max_completion_tokens or known.max_tokens or (None if chat else 16)


def _legs(fields: dict[str, msgspec.Raw], known: _Known, chat: bool, seed: int) -> list[dict[str, object]]:
    """The legs in OpenAI's order: n answers to the first prompt, then to the second, and so on."""
    common: dict[str, object] = {**fields}
    for name in _LEG_FIELDS:
        common.pop(name, None)
    if known.seed is None:
        common["seed"] = seed
    prompts = None if chat else _prompts(fields.get("prompt"))
    count = known.n or 1
    if prompts is None and count == 1:
        return [common]
    if len(prompts or [0]) * count > MAX_LEGS:
        raise ApiError(400, f"prompts times n must be at most {MAX_LEGS}", param="prompt")
    common.pop("best_of", None)
    each: list[dict[str, object]] = [{"prompt": prompt} for prompt in prompts] if prompts else [{}]
    legs = [{**common, **prompt} for prompt in each for _ in range(count)]
    # A separate seed per choice: they are independent samples.
    for number, leg in enumerate(legs[1:], 1):
        leg["seed"] = (seed + number) % 2**63
    return legs


def _prompts(raw: msgspec.Raw | None) -> list[msgspec.Raw] | None:
    """The prompts of a list of prompts; None for a single one: a string, or a list of token ids."""
    if raw is None or not bytes(raw).startswith(b"["):
        return None
    items = _decode_prompts(raw)
    first = bytes(items[0])[:1] if items else b""
    if first not in (b'"', b"["):
        return None
    if any(_NOT_A_PROMPT.match(item) for item in items):
        raise ApiError(400, "prompt must be a string, a list of token ids, or a list of these", param="prompt")
    return items
