"""Join a stream's events into the choice of an unstreamed answer."""

from __future__ import annotations

import msgspec

from pdctl.adapters import Choice

# Delta fields that repeat a value instead of appending to it.
_NAMES = frozenset({"role", "id", "type", "name", "index", "function_name"})

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode

Json = dict[str, object]


class Gathered:
    """One choice. Text and lists grow, `tool_calls` are matched by index, other fields take the last value."""

    def __init__(self, chat: bool, with_token_ids: bool) -> None:
        self._chat = chat
        self._fields: Json = {}
        self._text: list[str] = []
        self._message: Json = {"role": "assistant", "content": None}
        self._token_ids: list[int] | None = [] if with_token_ids else None

    def add(self, choice: Choice, token_ids: list[int]) -> None:
        """Add the next event's choice."""
        if self._token_ids is not None:
            self._token_ids += token_ids
        for name, raw in choice.items():
            value = _decode(raw)
            if name == "text":
                self._text.append(str(value))
            elif name == "delta":
                assert isinstance(value, dict)
                _merge(self._message, value)
            elif name == "logprobs" and isinstance(value, dict):
                found = self._fields.get("logprobs")
                self._fields["logprobs"] = _longer(found if isinstance(found, dict) else {}, value)
            elif value is not None or name not in self._fields:
                self._fields[name] = value

    def choice(self) -> Choice:
        """The complete choice, without its index."""
        whole: Json = {**self._fields}
        if self._chat:
            calls = self._message.get("tool_calls")
            if isinstance(calls, list):
                self._message["tool_calls"] = [_without_index(call) for call in calls]
                self._message["content"] = self._message["content"] or None
            elif self._message["content"] is None:
                self._message["content"] = ""
            whole["message"] = self._message
        else:
            whole["text"] = "".join(self._text)
        if self._token_ids is not None:
            whole["token_ids"] = self._token_ids
        return {name: msgspec.Raw(_encode(value)) for name, value in whole.items()}


def _merge(into: Json, delta: Json) -> None:
    for name, value in delta.items():
        if value is None:
            into.setdefault(name, None)
        elif name == "tool_calls" and isinstance(value, list):
            _merge_calls(into, value)
        elif isinstance(value, str) and name not in _NAMES:
            before = into.get(name)
            into[name] = (before if isinstance(before, str) else "") + value
        elif isinstance(value, dict):
            inner = into.get(name)
            into[name] = inner if isinstance(inner, dict) else {}
            _merge(_as_dict(into[name]), value)
        else:
            into[name] = value


def _merge_calls(into: Json, calls: list[object]) -> None:
    known = into.get("tool_calls")
    if not isinstance(known, list):
        known = into["tool_calls"] = []
    for call in calls:
        new = _as_dict(call)
        same = next((old for old in known if _as_dict(old).get("index") == new.get("index")), None)
        if same is None:
            known.append(same := {})
        _merge(_as_dict(same), new)


def _longer(known: Json, more: Json) -> Json:
    """Join log probabilities: lists over tokens are concatenated."""
    merged = {**known}
    for name, value in more.items():
        before = merged.get(name)
        merged[name] = [*before, *value] if isinstance(before, list) and isinstance(value, list) else value
    return merged


def _without_index(call: object) -> object:
    return {name: value for name, value in _as_dict(call).items() if name != "index"}


def _as_dict(value: object) -> Json:
    assert isinstance(value, dict)
    return value
