"""What holds for every family: pieces give what the whole text gives, nothing is lost, and vLLM finds the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.engine.front.api.parsers.tool_calls import ToolFormat, joined, tool_text, whole_calls
from pdctl.names.parsers import TOOL_FAMILIES
from tests.engine.front.parsers.tool_calls.parsing import functions, parser, split
from tests.engine.front.parsers.tool_calls.record_vllm import TEXTS, TOOLS

RECORDED = json.loads((Path(__file__).parent / "recorded_vllm.json").read_text())
CASES = [(name, text) for name, texts in TEXTS.items() if name != "think" for text in texts]
# Where pdctl differs from vLLM on purpose.
DIFFERENT = {
    # The text before a call stays as it was, as with vLLM's other parsers.
    TEXTS["qwen3_coder"][1]: "Let me see.\n",
}
# Parts of every family's calls, whole and broken.
FRAGMENTS = st.lists(
    st.sampled_from(
        ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<function=f>",
         "</function>", "<parameter=a>", "</parameter>", '{"name": "f", ', '"arguments": ', '"parameters": ', "{", "}",
         "[", "]", ",", ";", " ", "\n", '"', "\\", "<", "text", "é🌧", '{"a": 1}', "f", "null", ":"]
    ),
    max_size=14,
).map("".join)  # fmt: skip


def family_of(case: str) -> str:
    return case.removesuffix("_v11")


@pytest.mark.parametrize("name", [name for name in RECORDED if name != "think"])
def test_vllm_finds_the_same_calls(name: str) -> None:
    assert [entry["text"] for entry in RECORDED[name]] == TEXTS[name], "record again: see record_vllm.py"
    for entry in RECORDED[name]:
        shown, calls = split(entry["text"], [], family_of(name), tools=TOOLS)
        assert [list(call) for call in functions(calls)] == entry["calls"]
        assert shown == DIFFERENT.get(entry["text"], entry["content"] or "")


@pytest.mark.parametrize(("name", "text"), CASES)
def test_every_split_gives_what_the_whole_gives(name: str, text: str) -> None:
    whole = split(text, [], family_of(name), tools=TOOLS)
    for cut in range(len(text) + 1):
        assert split(text, [cut], family_of(name), tools=TOOLS) == whole, cut
    assert split(text, list(range(len(text))), family_of(name), tools=TOOLS) == whole


@pytest.mark.parametrize("name", TOOL_FAMILIES)
@given(text=FRAGMENTS, cuts=st.lists(st.integers(0, 160), max_size=12))
def test_broken_calls_in_pieces_are_what_they_are_as_a_whole(name: str, text: str, cuts: list[int]) -> None:
    assert split(text, cuts, name, tools=TOOLS) == split(text, [], name, tools=TOOLS)


@pytest.mark.parametrize("name", TOOL_FAMILIES)
@given(text=st.text(alphabet="ab <>/[]{}\n\"'tolcATSR_|;", max_size=60))
def test_text_without_calls_is_only_text(name: str, text: str) -> None:
    assert split(text, [], name) == (text, [])


@pytest.mark.parametrize(("name", "text"), CASES)
def test_parts_that_were_sent_before_a_failover_are_left_out_after_it(name: str, text: str) -> None:
    """Another engine pushes the same text and discards what comes; then it goes on with the same parts."""
    for cut in range(0, len(text), 3):
        one, other = (parser(family_of(name), tools=TOOLS) for _ in range(2))
        before = one.push(text[:cut])
        for letter in text[:cut]:
            other.push(letter)
        assert other.found == one.found
        assert other.push(text[cut:]) == one.push(text[cut:]), before
        assert other.flush() == one.flush()


@pytest.mark.parametrize("name", TOOL_FAMILIES)
def test_arguments_come_while_they_grow(name: str) -> None:
    text = next(text for case, text in CASES if family_of(case) == name)
    found = parser(name, tools=TOOLS)
    parts = [part for letter in text for part in found.push(letter)[1]]
    assert len(parts) > 2
    assert "id" in parts[0]
    assert all(list(part) == ["index", "function"] for part in parts[1:])
    assert whole_calls(joined(parts)) == split(text, [], name, tools=TOOLS)[1]


@pytest.mark.parametrize("name", TOOL_FAMILIES)
def test_ids_are_the_same_on_every_engine_and_differ_within_a_request(name: str) -> None:
    text = next(text for case, text in CASES if family_of(case) == name and len(split(text, [], name)[1]) == 2)
    (first, second), again = split(text, [], name)[1], split(text, [9], name)[1]
    assert first["id"] != second["id"]
    assert [first["id"], second["id"]] == [call["id"] for call in again]


def test_mistrals_ids_are_nine_letters_and_digits() -> None:
    for form, text in ((ToolFormat.FREE, "[TOOL_CALLS]f{}"), (ToolFormat.FORCED, '{"name": "f", "arguments": {}}')):
        (call,) = split(text, [], "mistral", form)[1]
        assert len(str(call["id"])) == 9
        assert str(call["id"]).isalnum()


def test_without_a_family_calls_stay_in_the_text() -> None:
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    found = tool_text(None, ToolFormat.FREE, "r")
    assert (found.push(text), found.flush(), found.found) == ((text, []), ("", []), 0)
