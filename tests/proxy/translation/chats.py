"""Outputs of chats as engines stream them, and what clients see of an answer made from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
from hypothesis import strategies as st

from pdctl.adapters import Choice
from pdctl.net.openai.api import Counts, Envelope
from pdctl.proxy.client.unknown_fields import UnknownFields
from pdctl.proxy.translation import Api, Translated

Json = dict[str, Any]
COUNTS = Counts(7, 3)


def part(reason: str | None = None, beside: Json | None = None, **delta: object) -> Choice:
    """One choice of a stream. `beside`: fields of the choice beside the delta."""
    fields = {"delta": delta, "finish_reason": reason, **(beside or {})}
    return {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in fields.items()}


def call(index: int, arguments: str, name: str | None = None) -> Choice:
    """A part of a tool call; the first one has its name."""
    about = {"id": f"call_{index}", "type": "function"} if name else {}
    function = {"arguments": arguments, **({"name": name} if name else {})}
    return part(tool_calls=[{"index": index, **about, "function": function}])


def translated(api: Api, body: object, refuse: bool = False) -> Translated:
    return api.translate(msgspec.json.encode(body), UnknownFields(refuse))


def chat_of(api: Api, body: object) -> Json:
    """The chat request that a request becomes, as an engine reads it."""
    return dict(json.loads(translated(api, body).chat_body()))


def whole(api: Api, body: object, choices: Sequence[Choice]) -> Json:
    """The answer that is not streamed."""
    rendering = translated(api, body).rendering(Envelope("r1", True, "m", False, 100))
    for choice in choices:
        rendering.gather(choice)
    return dict(json.loads(rendering.whole(COUNTS)))


def streamed(api: Api, body: object, choices: Sequence[Choice]) -> list[Json]:
    """The events of the streamed answer. Each event's name is its type."""
    rendering = translated(api, body).rendering(Envelope("r1", True, "m", False, 100))
    data = b"".join(rendering.events(choice, COUNTS) for choice in choices) + rendering.last_events(COUNTS)
    return events(data)


def events(data: bytes) -> list[Json]:
    assert data.endswith(b"\n\n")
    found = []
    for event in data.decode().removesuffix("\n\n").split("\n\n"):
        name, _, body = event.removeprefix("event: ").partition("\ndata: ")
        found.append(json.loads(body))
        assert found[-1]["type"] == name
    return found


_TEXT = st.text(st.sampled_from('ab "\\\n{}é'), max_size=6)
_TURN = st.tuples(st.sampled_from(["reasoning", "content", "call"]), st.lists(_TEXT, min_size=1, max_size=4))


@st.composite
def outputs(draw: st.DrawFn) -> list[Choice]:
    """Any output: reasoning, texts and calls in any order, each in several parts, with any end."""
    choices: list[Choice] = []
    calls = 0
    for kind, texts in draw(st.lists(_TURN, max_size=6)):
        if kind == "call":
            choices.append(call(calls, texts[0], "f"))
            choices += [call(calls, text) for text in texts[1:]]
            calls += 1
        else:
            name = draw(st.sampled_from(["reasoning", "reasoning_content"])) if kind == "reasoning" else kind
            said: list[Json] = [{name: text} for text in texts]
            choices += [part(**one) for one in said]
    reason = draw(st.sampled_from(["stop", "length", "tool_calls" if calls else "stop"]))
    return [part(role="assistant", content=""), *choices, part(reason)]
