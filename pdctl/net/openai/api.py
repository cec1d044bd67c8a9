"""OpenAI-shaped answers and errors, used by engine and proxy."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import msgspec

from pdctl import __version__

T = TypeVar("T")

# OpenAI's system_fingerprint: the same seed gives the same answer as long as this is the same.
FINGERPRINT = f"pdctl-{__version__}"

# Limit of rewritten whole-number fields per request.
_MOST_WHOLE = 32
_WANTED_INT = re.compile(r"Expected `[^`]*\bint\b[^`]*`, got `float` - at `\$\.(\w+)(?:\[[\d.]+\])*`$")


class ApiError(Exception):
    """An error answer. `kind`: OpenAI's error type; `retry_after`: seconds; `allow`: allowed methods, with 405."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        retry_after: int | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.retry_after = retry_after
        self.allow = allow

    def body(self) -> bytes:
        """The body in OpenAI's error format."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}
        return msgspec.json.encode({"error": error})


def field_of(failure: msgspec.ValidationError) -> str | None:
    """The field in msgspec's message, which ends in a path such as $.max_tokens."""
    found = re.search(r"`\$\.(\w+)", str(failure)) or re.search(r"field `(\w+)`", str(failure))
    return found[1] if found else None


def decode_request(decode: Callable[[bytes], T], body: bytes) -> T:
    """Decode a client's JSON. Whole numbers may be written as 5.0 or 5e0, as some JSON libraries do.

    Raises ApiError 400 that names the field.
    """
    try:
        for _ in range(_MOST_WHOLE):
            try:
                return decode(body)
            except msgspec.ValidationError as failure:
                # This parses the complete body and may find errors beyond the field at which the decoder stopped.
                rewritten = _with_whole_number(body, failure)
                if rewritten is None:
                    raise ApiError(400, str(failure), param=field_of(failure)) from None
                body = rewritten
    except (msgspec.DecodeError, UnicodeDecodeError) as failure:
        raise ApiError(400, f"the body is not valid JSON: {failure}") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    raise ApiError(400, "too many numbers that should be whole")


def _with_whole_number(body: bytes, failure: msgspec.ValidationError) -> bytes | None:
    """The body with the field in msgspec's error rewritten as whole numbers; None if this does not apply.

    If a name occurs twice, msgspec may mean either; the last one counts, and the others are dropped.
    """
    wanted = _WANTED_INT.match(str(failure))
    if wanted is None:
        return None
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    try:
        before = msgspec.json.decode(fields[wanted[1]])
    except msgspec.DecodeError:
        # A number outside the range of floats.
        return None
    after = _whole(before)
    count = body.count(b'"%b"' % wanted[1].encode())
    if after is before and count < 2:
        return None
    return msgspec.json.encode({**fields, wanted[1]: after})


def _whole(value: object) -> object:
    """Convert whole floats to integers, also within lists; returns the same object if there are none."""
    if isinstance(value, float):
        # Above 2^53 a float does not identify one whole number.
        return int(value) if value.is_integer() and abs(value) <= 2**53 else value
    if isinstance(value, list):
        found = [_whole(item) for item in value]
        return found if any(new is not old for new, old in zip(found, value, strict=True)) else value
    return value


def shown_number(value: float) -> str:
    """A number of any size, shortened for messages."""
    return str(value) if abs(value) < 10**24 else f"a number of {len(str(int(value)))} digits"


@dataclass(slots=True)
class Envelope:
    """The fields that every part of an answer repeats."""

    request_id: str
    chat: bool
    model: str
    with_token_ids: bool
    created: int = field(default_factory=lambda: int(time.time()))
    fingerprint: str = FINGERPRINT

    def event(
        self, index: int, choice: Mapping[str, object], token_ids: list[int], counts: dict[str, object] | None = None
    ) -> bytes:
        """One server-sent event with one choice (given without its index); `counts`: the usage so far."""
        body = self._outer("chat.completion.chunk" if self.chat else "text_completion")
        body["choices"] = [self._with_ids({"index": index, **choice}, token_ids)]
        return _event(body | {"usage": counts} if counts else body)

    def event_head(self) -> bytes:
        """The bytes of an event before the choice."""
        outer = self._outer("chat.completion.chunk" if self.chat else "text_completion")
        return b"data: " + msgspec.json.encode(outer)[:-1] + b',"choices":['

    def body(
        self,
        choices: Sequence[Mapping[str, object]],
        usage: dict[str, object],
        extra: dict[str, object] | None = None,
        token_ids: list[int] | None = None,
    ) -> bytes:
        """The body of an unstreamed answer with choices in order; `token_ids`: those of a single choice."""
        numbered: list[dict[str, object]] = [{"index": index, **choice} for index, choice in enumerate(choices)]
        extra = {**(extra or {})}
        if self.chat and "message" in numbered[0]:
            # In a chat answer, vLLM puts them beside the choices.
            told = [choice.pop("prompt_logprobs", None) for choice in numbered]
            extra |= {"prompt_logprobs": told[0]} if told[0] is not None else {}
        if token_ids is not None:
            numbered = [self._with_ids(choice, token_ids) for choice in numbered]
        outer = self._outer("chat.completion" if self.chat else "text_completion")
        return msgspec.json.encode(outer | {"choices": numbered, "usage": usage} | extra)

    def usage_chunk(self, usage: dict[str, object]) -> bytes:
        """The event with the token counts, for `include_usage`."""
        body = self._outer("chat.completion.chunk" if self.chat else "text_completion")
        return _event(body | {"choices": [], "usage": usage})

    def _with_ids(self, choice: dict[str, object], token_ids: list[int]) -> dict[str, object]:
        return choice | {"token_ids": token_ids} if self.with_token_ids else choice

    def _outer(self, kind: str) -> dict[str, object]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.request_id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


class Counts(NamedTuple):
    """Token counts of an answer. `cached`: tokens of the prompt whose KV was there already; `reasoning`: those of the
    completion that are reasoning."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0


def usage(counts: Counts) -> dict[str, object]:
    """OpenAI's usage object."""
    found: dict[str, object] = {
        "prompt_tokens": counts.prompt,
        "completion_tokens": counts.completion,
        "total_tokens": counts.prompt + counts.completion,
    }
    if counts.cached:
        found["prompt_tokens_details"] = {"cached_tokens": counts.cached}
    if counts.reasoning:
        found["completion_tokens_details"] = {"reasoning_tokens": counts.reasoning}
    return found


DONE = b"data: [DONE]\n\n"


def _event(body: dict[str, object]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
