"""OpenAI-shaped answers and errors, as engine and proxy both send them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from pdctl import __version__

T = TypeVar("T")

# OpenAI's name for what computes answers: the same seed gives the same answer while it stays the same.
FINGERPRINT = f"pdctl-{__version__}"

# Fields of a request that are whole numbers, at most.
_MOST_WHOLE = 32
_WANTED_INT = re.compile(r"Expected `[^`]*\bint\b[^`]*`, got `float` - at `\$\.(\w+)(?:\[[\d.]+\])*`$")


class ApiError(Exception):
    """An answer other than 200. `kind` is OpenAI's error type; `retry_after` in seconds; `allow`: methods, with 405."""

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
        """OpenAI's error envelope."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}
        return msgspec.json.encode({"error": error})


def field_of(failure: msgspec.ValidationError) -> str | None:
    """The field that msgspec's message is about: it ends in a path such as $.max_tokens."""
    found = re.search(r"`\$\.(\w+)", str(failure)) or re.search(r"field `(\w+)`", str(failure))
    return found[1] if found else None


def decode_request(decode: Callable[[bytes], T], body: bytes) -> T:
    """A client's JSON. Whole numbers may be written as 5.0 or 5e0, as JSON writers of some languages do.

    Raises ApiError 400 that names the field.
    """
    try:
        for _ in range(_MOST_WHOLE):
            try:
                return decode(body)
            except msgspec.ValidationError as failure:
                # Reads all of the body, and may find what the decoder, which ended at this field, had not yet met.
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
    """The body with the field that msgspec complains about written in whole numbers; None where it is not such a field.

    Of a name that comes twice msgspec may mean either, and the last one counts: the others are dropped.
    """
    wanted = _WANTED_INT.match(str(failure))
    if wanted is None:
        return None
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    try:
        before = msgspec.json.decode(fields[wanted[1]])
    except msgspec.DecodeError:
        # A number beyond all floats.
        return None
    after = _whole(before)
    count = body.count(b'"%b"' % wanted[1].encode())
    if after is before and count < 2:
        return None
    return msgspec.json.encode({**fields, wanted[1]: after})


def _whole(value: object) -> object:
    """A value with whole floats as whole numbers, also within lists; the same object where there are none."""
    if isinstance(value, float):
        # Beyond 2^53 a float does not say which whole number is meant.
        return int(value) if value.is_integer() and abs(value) <= 2**53 else value
    if isinstance(value, list):
        found = [_whole(item) for item in value]
        return found if any(new is not old for new, old in zip(found, value, strict=True)) else value
    return value


def shown_number(value: float) -> str:
    """For messages: a number of any size, at a length that people read."""
    return str(value) if abs(value) < 10**24 else f"a number of {len(str(int(value)))} digits"


@dataclass(slots=True)
class Envelope:
    """What every part of one answer repeats."""

    request_id: str
    chat: bool
    model: str
    with_token_ids: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def event(
        self, index: int, choice: Mapping[str, object], token_ids: list[int], counts: dict[str, int] | None = None
    ) -> bytes:
        """One server-sent event of a stream, around one choice (without its index); `counts`: a usage so far."""
        body = self._outer("chat.completion.chunk" if self.chat else "text_completion")
        body["choices"] = [self._with_ids({"index": index, **choice}, token_ids)]
        return _event(body | {"usage": counts} if counts else body)

    def event_head(self) -> bytes:
        """What `event` writes before the choice."""
        outer = self._outer("chat.completion.chunk" if self.chat else "text_completion")
        return b"data: " + msgspec.json.encode(outer)[:-1] + b',"choices":['

    def body(
        self,
        choices: Sequence[Mapping[str, object]],
        usage: dict[str, int],
        extra: dict[str, object] | None = None,
        token_ids: list[int] | None = None,
    ) -> bytes:
        """The body of an unstreamed answer around choices, in order; `token_ids` of the only one."""
        numbered: list[dict[str, object]] = [{"index": index, **choice} for index, choice in enumerate(choices)]
        extra = {**(extra or {})}
        if self.chat and "message" in numbered[0]:
            # vLLM's place for them in a chat: beside the choices.
            told = [choice.pop("prompt_logprobs", None) for choice in numbered]
            extra |= {"prompt_logprobs": told[0]} if told[0] is not None else {}
        if token_ids is not None:
            numbered = [self._with_ids(choice, token_ids) for choice in numbered]
        outer = self._outer("chat.completion" if self.chat else "text_completion")
        return msgspec.json.encode(outer | {"choices": numbered, "usage": usage} | extra)

    def usage_chunk(self, usage: dict[str, int]) -> bytes:
        """The event that carries the counts when `include_usage` asked for it."""
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
            "system_fingerprint": FINGERPRINT,
        }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


DONE = b"data: [DONE]\n\n"


def _event(body: dict[str, object]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
