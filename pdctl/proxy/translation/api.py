"""What an API provides so that the proxy serves it by translation to chat completions. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import msgspec

from pdctl.adapters import Choice
from pdctl.net.openai.api import ApiError, Counts, Envelope
from pdctl.proxy.client.unknown_fields import UnknownFields

Json = dict[str, object]

CHAT_PATH = "/v1/chat/completions"

# The engines' own sampling fields and OpenAI's common ones. They have the same meaning in every API and are passed on.
PASSED = (
    "seed", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "stop", "stop_token_ids",
    "allowed_token_ids", "bad_words", "logit_bias", "min_tokens", "ignore_eos", "priority", "chat_template_kwargs",
    "include_stop_str_in_output", "truncate_prompt_tokens",
)  # fmt: skip
# The fields of a chat that /tokenize takes, too.
_TOKENIZED = (
    "model", "messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message",
)  # fmt: skip

_encode = msgspec.json.Encoder().encode


class Rendering(Protocol):
    """One answer in the API's form, from a chat's choices. A stream and a whole answer have the same content."""

    def gather(self, choice: Choice) -> None:
        """Take the next part of an answer that is not streamed."""
        ...

    def events(self, choice: Choice, counts: Counts) -> bytes:
        """Take the next part of a stream and return its events, after those that begin the stream."""
        ...

    def last_events(self, counts: Counts) -> bytes:
        """The events at the end of a complete stream."""
        ...

    def error_events(self, failure: ApiError) -> bytes:
        """The events at the end of a stream that cannot be completed."""
        ...

    def whole(self, counts: Counts) -> bytes:
        """The complete answer as one body."""
        ...


@dataclass(frozen=True, slots=True)
class Translated:
    """A translated request. `chat`: the fields of the chat request; `ignored`: names of dropped fields.

    `in_order`: text and tool calls may alternate, so the answer must be gathered from a stream to keep their order.
    """

    chat: Json
    ignored: list[str]
    in_order: bool
    rendering: Callable[[Envelope], Rendering]

    def chat_body(self) -> bytes:
        """The body for /v1/chat/completions."""
        return _encode(self.chat)

    def tokenize_body(self) -> bytes:
        """The body for /tokenize, which counts the prompt's tokens."""
        hidden = {"tools"} if self.chat.get("tool_choice") == "none" else set()
        shown = {name: self.chat[name] for name in _TOKENIZED if name in self.chat and name not in hidden}
        return _encode({"add_generation_prompt": True, **shown})


class Api(Protocol):
    """An API that is served by translation.

    `count_path`: where it counts tokens; `id_header`: where its clients expect the request id, if not in x-request-id.
    """

    path: str
    count_path: str
    id_header: bytes | None

    def translate(self, body: bytes, unknown: UnknownFields, counting: bool = False) -> Translated:
        """The chat request for a client's request. `counting`: only its tokens are counted. Raises ApiError."""
        ...

    def counted(self, tokens: int) -> bytes:
        """The body of the answer at `count_path`."""
        ...

    def error_body(self, failure: ApiError, request_id: str) -> bytes:
        """The body of an error answer."""
        ...


def renamed(failure: ApiError, names: Mapping[str, str]) -> ApiError:
    """An error about a chat's field as an error about the field that it came from. `names`: chat to client."""
    theirs = failure.param or ""
    if (own := names.get(theirs)) is None:
        return failure
    message = failure.message
    if message.startswith((f"{theirs} ", f"{theirs}:")):
        message = own + message.removeprefix(theirs)
    return ApiError(failure.status, message, failure.kind, own, failure.retry_after, failure.allow)


def event(kind: str, body: Json) -> bytes:
    """One server-sent event with its name."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), _encode({"type": kind, **body}))
