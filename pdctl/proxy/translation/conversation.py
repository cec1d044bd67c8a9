"""Builds the messages of a chat, and reads the content of other APIs' messages, with errors that name the place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar

import msgspec

from pdctl.net.openai.api import ApiError
from pdctl.proxy.translation.api import Json

T = TypeVar("T")

Name = Annotated[str, msgspec.Meta(min_length=1)]

read_text = msgspec.json.Decoder(str).decode

# Between texts for the system, which may come from several fields.
_PARAGRAPH = "\n\n"


class Conversation:
    """The messages of a chat.

    Chat templates expect one message of the system, at the beginning, and one message for all that the assistant said
    and called in a turn. Other APIs have a separate item for each.
    """

    def __init__(self) -> None:
        self.messages: list[Json] = []

    def system(self, text: str) -> None:
        """Add instructions; those at the beginning become one message."""
        if len(self.messages) == 1 and self.messages[0]["role"] == "system":
            self.messages[0]["content"] = f"{self.messages[0]['content']}{_PARAGRAPH}{text}"
        else:
            self.messages.append({"role": "system", "content": text})

    def user(self, texts: list[str]) -> None:
        """Add a message of the user."""
        self.messages.append({"role": "user", "content": _content(texts)})

    def tool(self, call_id: str, texts: list[str]) -> None:
        """Add the result of a tool call."""
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": _content(texts)})

    def assistant(self, text: str) -> None:
        """Add text of the assistant."""
        last = self._turn()
        if last["content"] is None or "tool_calls" in last:
            last["content"] = f"{last['content'] or ''}{text}"
        else:
            self.messages.append({"role": "assistant", "content": text})

    def reasoning(self, text: str) -> None:
        """Add reasoning of the assistant, which comes before its text."""
        last = self._turn()
        if last["content"] is not None or "tool_calls" in last:
            last = {"role": "assistant", "content": None}
            self.messages.append(last)
        last["reasoning_content"] = f"{last.get('reasoning_content', '')}{text}"

    def call(self, call_id: str, name: str, arguments: str) -> None:
        """Add a tool call of the assistant."""
        calls = self._turn().setdefault("tool_calls", [])
        assert isinstance(calls, list)
        calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})

    def _turn(self) -> Json:
        """The assistant's message, if it is the last one; else a new one."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": None})
        return self.messages[-1]


def _content(texts: list[str]) -> str | list[Json]:
    """One text as a string. Engines join several in their own way."""
    if len(texts) == 1:
        return texts[0]
    return [{"type": "text", "text": text} for text in texts] if texts else ""


def read(decode: Callable[[bytes], T], data: bytes, place: str) -> T:
    """A part of a request. Raises ApiError 400 that names the place."""
    try:
        return decode(data)
    except msgspec.ValidationError as failure:
        what, _, path = str(failure).partition(" - at `$")
        raise wrong(f"{place}{path.rstrip('`')}", what) from None


def needed(value: str | None, place: str, name: str) -> str:
    """A field that may not be missing or empty. Raises ApiError 400."""
    if not value:
        raise wrong(f"{place}.{name}", "is missing")
    return value


def given(fields: msgspec.Struct) -> Json:
    """The fields that were given."""
    return {name: value for name, value in msgspec.structs.asdict(fields).items() if value is not None}


def wrong(place: str, message: str) -> ApiError:
    """An error about a place in a request, such as `input[0].content`. Its param is the field."""
    return ApiError(400, f"{place}: {message}", param=place.partition("[")[0].partition(".")[0])


def unsupported(place: str, what: str, supported: str) -> ApiError:
    """An error for something that this service does not have."""
    return wrong(place, f"{shown(what)} is not supported; {supported}")


def shown(word: str) -> str:
    """A client's word in a message, shortened."""
    return repr(word[:64])
