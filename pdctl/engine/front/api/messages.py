"""A chat's messages in the form that chat templates expect."""

from __future__ import annotations

import json

from pdctl.net.openai.api import ApiError


def messages_of(messages: list[dict[str, object]]) -> list[dict[str, object]]:
    """A chat's messages with their content as text, as templates need it. Raises ApiError."""
    if not messages:
        raise ApiError(400, "messages is empty", param="messages")
    found = []
    for number, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise ApiError(400, f"messages[{number}] has no role", param="messages")
        shown = {**message, "content": _text(message.get("content"), number)}
        thought = message.get("reasoning") or message.get("reasoning_content")
        if isinstance(thought, str):
            # vLLM's name and the one in most templates.
            shown |= {"reasoning": thought, "reasoning_content": thought}
        if isinstance(calls := message.get("tool_calls"), list):
            shown["tool_calls"] = [_with_object(call) for call in calls]
        found.append(shown)
    return found


def _with_object(call: object) -> object:
    """A call with its arguments as an object, as in vLLM: templates write them as JSON, and clients send text."""
    function = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(arguments, str):
        return call
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": value}} if isinstance(value, dict) else call


def _text(content: object, number: int) -> str | None:
    """The content as text: a string, None (with tool calls), or joined text parts."""
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) != len(parts) or not all(isinstance(text, str) for text in texts):
        message = f"messages[{number}].content must be a string or a list of text parts"
        raise ApiError(400, message, param="messages")
    return "".join(map(str, texts))
