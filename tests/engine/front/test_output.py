"""An output's text, reasoning and calls from its token ids, with marks that are special tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pdctl.engine.front.api.openai import GenerationRequest
from pdctl.engine.front.api.output import Json, Output, Piece, chunk_choice, whole_choice
from pdctl.engine.front.api.parsers import choose
from pdctl.engine.front.api.parsers.tool_calls import ToolFormat
from pdctl.engine.front.api.text import TextCodec
from pdctl.engine.ipc.messages import Sampling
from pdctl.net.openai.api import Envelope
from tests.marked_model import IDS, make, template

CALLS = {
    "hermes": ["<tool_call>", '{"name": "f", "arguments": {"a": "é"}}', "</tool_call>"],
    "llama3": ["<|python_tag|>", '{"name": "f", "parameters": {"a": "é"}}'],
    "mistral": ["[TOOL_CALLS]", "f", "[ARGS]", '{"a": "é"}'],
    "qwen3_coder": ["<tool_call>", "<function=f><parameter=a>é</parameter></function>", "</tool_call>"],
}


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tiny_model, tmp_path_factory.mktemp("marked"), "")


def ids_of(codec: TextCodec, parts: list[str]) -> list[int]:
    return [one for part in parts for one in ([IDS[part]] if part in IDS else codec.encode(part))]


def request(prompt: list[int], **more: Any) -> GenerationRequest:
    given: dict[str, Any] = {
        "sampling": Sampling(max_tokens=99), "stops": [], "stream": True, "include_usage": False, "resume": [],
        "hold": False, "hand_over": None, "tool_calls": ToolFormat.FREE, "splits_reasoning": True, **more,
    }  # fmt: skip
    return GenerationRequest("r.1", Envelope("r", True, "m", False), prompt, **given)


def run(model: Path, family: str, parts: list[str], begin: str = "", **more: Any) -> list[Piece]:
    """The pieces of an output. `begin`: the end of the prompt."""
    codec = TextCodec(model)
    parsers = choose("auto", more.pop("reasoning", "auto"), template(family, begin))
    output = Output(codec, parsers, request(codec.encode(f"[assistant] {begin}"), **more))
    *ids, last = ids_of(codec, parts)
    return [*(output.token(one, None) for one in ids), output.token(last, "stop")]


def message(pieces: list[Piece]) -> dict[str, Any]:
    found = whole_choice(pieces, chat=True)["message"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("family", CALLS)
def test_marks_that_are_special_tokens_are_read_and_not_shown(model: Path, family: str) -> None:
    pieces = run(model, family, CALLS[family])
    (call,) = message(pieces)["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"a": "é"}'}
    assert message(pieces)["content"] is None
    assert pieces[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize("family", CALLS)
def test_of_a_broken_call_only_the_text_is_shown(model: Path, family: str) -> None:
    mark, *_ = CALLS[family]
    found = message(run(model, family, ["a", mark, " b, c"]))
    assert found == {"role": "assistant", "content": "a b, c"}


@pytest.mark.parametrize("family", CALLS)
def test_without_tools_marks_are_skipped_as_ever(model: Path, family: str) -> None:
    found = message(run(model, family, ["a", *CALLS[family]], tool_calls=ToolFormat.NONE))
    assert found == {"role": "assistant", "content": "a" + "".join(part for part in CALLS[family] if part not in IDS)}


@pytest.mark.parametrize("family", CALLS)
@pytest.mark.parametrize("begin", ["", "<think>\n"])
def test_reasoning_comes_before_calls(model: Path, family: str, begin: str) -> None:
    parts = [*([] if begin else ["<think>"]), "\nwéll", "</think>", "\n\n", *CALLS[family]]
    pieces = run(model, family, parts, begin, reasoning="think")
    found = message(pieces)
    assert (found["reasoning"], found["reasoning_content"], found["content"]) == ("wéll", "wéll", None)
    assert len(found["tool_calls"]) == 1
    kinds = [name for piece in pieces for name in _delta(piece) if name in ("reasoning", "tool_calls")]
    assert kinds == sorted(kinds), "reasoning first"


def _delta(piece: Piece) -> Json:
    found = chunk_choice(piece, chat=True, first=False)["delta"]
    assert isinstance(found, dict)
    return found


def test_a_stream_has_what_the_whole_answer_has(model: Path) -> None:
    pieces = run(model, "mistral", ["[THINK]", "a b", "[/THINK]", "c", *CALLS["mistral"]], reasoning="mistral")
    deltas = list(map(_delta, pieces))
    whole = message(pieces)
    for name in ("content", "reasoning", "reasoning_content"):
        assert "".join(str(delta.get(name, "")) for delta in deltas) == whole[name]
    assert all(delta["reasoning"] == delta["reasoning_content"] for delta in deltas if "reasoning" in delta)


def test_reasoning_that_is_not_wanted_is_left_out(model: Path) -> None:
    found = run(model, "hermes", ["<think>", "a", "</think>", "b"], reasoning="think", shows_reasoning=False)
    assert message(found) == {"role": "assistant", "content": "b"}
    whole = run(model, "hermes", ["<think>", "a", "</think>", "b"], reasoning="think", splits_reasoning=False)
    assert message(whole) == {"role": "assistant", "content": "ab"}


@pytest.mark.parametrize("stops", [[], ["never there"], ["</thinker", "é zz"]])
@pytest.mark.parametrize(
    ("begin", "parts", "among"),
    [("", ["<think>", "a é b", "</think>", "c d"], "a é b"), ("<think>\n", ["\na é", "</think>", "c"], "\na é"),
     ("", ["a b", "<think>", "c"], ""), ("", ["<think>", "a b"], "a b"), ("<think>", ["</think>", "a"], ""),
     ("", ["<think>", "a <tool", "<tool_call>", "b"], "a <tool")],
)  # fmt: skip
def test_tokens_of_reasoning_are_counted_without_the_marks(
    model: Path, begin: str, parts: list[str], among: str, stops: list[str]
) -> None:
    codec = TextCodec(model)
    ids, expected = ids_of(codec, parts), len(codec.encode(among)) if among else 0
    for cut in range(len(ids)):
        asked = request(codec.encode(f"[assistant] {begin}"), resume=ids[:cut], stops=stops)
        output = Output(codec, choose("auto", "think", template("hermes")), asked)
        for one in ids[cut:]:
            output.token(one, None)
        assert asked.reasoning == expected, cut


def test_further_calls_are_left_out_where_only_one_is_wanted(model: Path) -> None:
    parts = [*CALLS["mistral"], *CALLS["mistral"]]
    assert len(message(run(model, "mistral", parts))["tool_calls"]) == 2
    assert len(message(run(model, "mistral", parts, one_call=True))["tool_calls"]) == 1


@pytest.mark.parametrize("family", CALLS)
def test_another_engine_goes_on_with_the_same_pieces(model: Path, family: str) -> None:
    parts = ["<think>", "a é", "</think>", "\n", *CALLS[family]]
    whole = run(model, family, parts, reasoning="think")
    codec = TextCodec(model)
    ids = ids_of(codec, parts)
    for cut in range(1, len(ids)):
        parsers = choose("auto", "think", template(family))
        output = Output(codec, parsers, request(codec.encode("[assistant] "), resume=ids[:cut]))
        again = [output.token(one, None) for one in ids[cut:-1]]
        assert [*again, output.token(ids[-1], "stop")] == whole[cut:]


def test_a_mark_within_a_character_does_not_hide_it(model: Path) -> None:
    codec = TextCodec(model)
    half = codec.encode("é")[0]
    output = Output(codec, choose("auto", "none", template("mistral")), request(codec.encode("[assistant] ")))
    pieces = [output.token(half, None), output.token(IDS["[TOOL_CALLS]"], None)]
    pieces += [output.token(one, None) for one in ids_of(codec, ["f{}"])]
    found = message([*pieces, output.end()])
    assert found["content"] == "\ufffd"
    assert len(found["tool_calls"]) == 1
