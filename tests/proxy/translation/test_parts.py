"""The output of a chat as reasoning, texts and tool calls."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given

from pdctl.adapters import Choice
from pdctl.net.openai.api import ApiError
from pdctl.proxy.translation.parts import Action, Kind, OutputParts, Part, arguments_of
from tests.proxy.translation.chats import call, outputs, part


def parts_of(*choices: Choice) -> list[tuple[str, str]]:
    output = OutputParts("r1")
    for choice in choices:
        output.add(choice)
    output.end()
    return [(one.kind.value, one.text) for one in output.parts]


def test_white_space_around_calls_is_no_text() -> None:
    assert parts_of(
        part(content="\n\n"), call(0, "{}", "f"), part(content="\n"), call(1, '{"a"', "g"), call(1, ": 1}"),
        part(content="\n"), part("tool_calls"),
    ) == [("call", "{}"), ("call", '{"a": 1}')]  # fmt: skip


def test_white_space_before_a_text_belongs_to_it() -> None:
    assert parts_of(part(content="\n"), part(content=" "), part(content="a "), part("stop", content="\n")) == [
        ("text", "\n a \n")
    ]
    assert parts_of(call(0, "{}", "f"), part(content="\n"), part("stop", content="so")) == [
        ("call", "{}"), ("text", "\nso"),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_output_without_anything_to_see_is_a_text(text: str) -> None:
    assert parts_of(part("length", content=text)) == [("text", text)]


def test_a_call_without_id_gets_one_and_keeps_it() -> None:
    output = OutputParts("r1")
    output.add(part(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]))
    output.add(part("tool_calls", tool_calls=[{"function": {"arguments": "}"}}]))
    [found] = output.parts
    assert (found.call_id, found.name, found.text) == ("call_r1_0", "f", "{}")


def test_a_whole_message_has_calls_without_index() -> None:
    calls = [{"id": f"c{n}", "type": "function", "function": {"name": "f", "arguments": f"{n}"}} for n in range(2)]
    message = {"role": "assistant", "content": "a", "tool_calls": calls}
    choice = {"message": msgspec.Raw(json.dumps(message).encode()), "finish_reason": msgspec.Raw(b'"tool_calls"')}
    assert parts_of(choice) == [("text", "a"), ("call", "0"), ("call", "1")]


@pytest.mark.parametrize(
    "choices",
    [
        [call(0, "{}", "f"), call(1, "{}", "f"), call(0, "{}")],
        [call(0, "{", "f"), part(content="a"), call(0, "}")],
        [part(tool_calls=[{"index": 0, "function": {"arguments": "{}"}}])],
    ],
    ids=["an earlier call grows", "a call grows after text", "no name"],
)
def test_calls_in_an_order_that_cannot_be_shown_are_an_error(choices: list[Choice]) -> None:
    output = OutputParts("r1")
    *first, last = choices
    for choice in first:
        output.add(choice)
    with pytest.raises(ApiError, match="in an order that this API cannot show") as raised:
        output.add(last)
    assert raised.value.status == 502


def test_an_answer_that_is_no_chats_is_the_engines_fault() -> None:
    with pytest.raises(ApiError, match="the engine's answer is malformed") as raised:
        OutputParts("r1").add({"delta": msgspec.Raw(b'{"content": 3}')})
    assert raised.value.status == 502


@pytest.mark.parametrize("name", ["stop_reason", "matched_stop"])
@pytest.mark.parametrize(("value", "stop"), [("END", "END"), (151645, None), (None, None)])
def test_the_stop_string_is_known_if_the_engine_reports_it(name: str, value: object, stop: str | None) -> None:
    output = OutputParts("r1")
    output.add(part("stop", {name: value}, content="a"))
    assert (output.finish_reason, output.stop) == ("stop", stop)


def test_log_probabilities_go_with_the_text_of_their_tokens() -> None:
    output = OutputParts("r1")

    def told(*names: str) -> dict[str, object]:
        return {"logprobs": {"content": [{"token": name} for name in names]}}

    steps = [
        *output.add(part(None, told("x"), content=" ")),
        *output.add(part(None, told("y"), content="a")),
        *output.add(part("stop", told("z"), content="")),
        *output.end(),
    ]
    grown = [(step.more, [json.loads(bytes(raw))["token"] for raw in step.logprobs or []]) for step in steps]
    assert [one for one, step in zip(grown, steps, strict=True) if step.action is Action.GROW] == [
        (" a", ["x", "y"]), ("", ["z"]),
    ]  # fmt: skip
    assert [json.loads(bytes(raw))["token"] for raw in output.parts[0].logprobs] == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("text", "found"),
    [("", {}), ('{"a": 1.50}', {"a": 1.5}), ('{"a"', {"INVALID_JSON": '{"a"'}), ("[1]", {"INVALID_JSON": "[1]"}),
     ("[" * 5000, {"INVALID_JSON": "[" * 5000})],
    ids=["none", "an object", "cut", "a list", "deep"],
)  # fmt: skip
def test_arguments_are_an_object_or_kept_as_text(text: str, found: object) -> None:
    one = Part(Kind.CALL, 0, said=[text])
    assert json.loads(msgspec.json.encode(arguments_of(one))) == found


@given(outputs())
def test_steps_are_in_order_and_their_texts_are_the_parts(choices: list[Choice]) -> None:
    output = OutputParts("r1")
    steps = [step for choice in choices for step in output.add(choice)] + output.end()
    texts: dict[int, str] = {}
    open_part: int | None = None
    for step in steps:
        number = step.part.number
        if step.action is Action.BEGIN:
            assert open_part is None
            assert (number, step.part.said) == (len(texts), [])
            texts[number], open_part = "", number
        assert open_part == number
        texts[number] += step.more
        open_part = None if step.action is Action.END else number
    assert open_part is None
    assert [texts[number] for number in sorted(texts)] == [one.text for one in output.parts]


@given(outputs())
def test_all_that_an_engine_says_is_shown_but_white_space(choices: list[Choice]) -> None:
    output = OutputParts("r1")
    said = {"text": "", "call": "", "reasoning": ""}
    for choice in choices:
        output.add(choice)
        delta = json.loads(bytes(choice["delta"]))
        said["text"] += delta.get("content") or ""
        said["reasoning"] += delta.get("reasoning") or delta.get("reasoning_content") or ""
        said["call"] += "".join(one["function"]["arguments"] for one in delta.get("tool_calls", []))
    output.end()
    for kind, text in said.items():
        shown = "".join(one.text for one in output.parts if one.kind.value == kind)
        if kind == "text":
            shown, text = "".join(shown.split()), "".join(text.split())
        assert shown == text
