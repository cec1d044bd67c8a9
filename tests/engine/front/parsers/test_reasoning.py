from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.engine.front.api.parsers.reasoning import MISTRAL, THINK, Marks, ReasoningText, is_open, marks_of_template

RECORDED = json.loads((Path(__file__).parent / "tool_calls" / "recorded_vllm.json").read_text())["think"]


def split(
    text: str, cuts: list[int], begun: bool = False, marks: Marks | None = THINK, enders: tuple[str, ...] = ()
) -> tuple[str, str]:
    """Reasoning and answer, if the text comes in pieces that end at `cuts`."""
    found = ReasoningText(marks, begun, enders)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [found.push(text[start:end]) for start, end in pairwise(edges)]
    parts.append(found.flush())
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize("entry", RECORDED, ids=lambda entry: entry["text"])
def test_vllm_finds_the_same_reasoning(entry: dict[str, str]) -> None:
    """Recorded by tool_calls/record_vllm.py. vLLM keeps the white space around both."""
    expected = ((entry["reasoning"] or "").strip(), (entry["content"] or "").strip())
    assert split(entry["text"], []) == expected
    if entry["content"]:
        # As if the prompt had begun the reasoning.
        assert split(entry["text"].removeprefix("<think>"), [], begun=True) == expected


@pytest.mark.parametrize(
    ("text", "begun", "thought", "answer"),
    [
        ("<think>a</think>b", False, "a", "b"), ("\n<think>\n a b \n</think>\n\nc ", False, "a b", "c "),
        ("a</think>b", True, "a", "b"), ("<think>a</think>b", True, "a", "b"), ("a", True, "a", ""),
        ("<think>", False, "", ""), ("<think></think>", False, "", ""), ("<think>a </th", False, "a </th", ""),
        ("b", False, "", "b"), (" b <think>c</think>", False, "", " b <think>c</think>"), ("<thin", False, "", "<thin"),
        ("  ", False, "", "  "), ("  ", True, "", ""), ("<thinker>", False, "", "<thinker>"),
        ("a</think>b</think>c", True, "a", "b</think>c"), ("é<", True, "é<", ""),
    ],
)  # fmt: skip
def test_reasoning_comes_before_the_answer(text: str, begun: bool, thought: str, answer: str) -> None:
    for cuts in ([], *([cut] for cut in range(1, len(text))), list(range(len(text)))):
        assert split(text, cuts, begun) == (thought, answer), cuts


@given(
    text=st.lists(st.sampled_from(["<think>", "</think>", "<tool_call>", " ", "\n", "a", "<", "é🌧"]), max_size=10),
    cuts=st.lists(st.integers(0, 60), max_size=8),
    begun=st.booleans(),
)
def test_pieces_give_what_the_whole_gives(text: list[str], cuts: list[int], begun: bool) -> None:
    whole = "".join(text)
    assert split(whole, cuts, begun, enders=("<tool_call>",)) == split(whole, [], begun, enders=("<tool_call>",))


def test_reasoning_comes_while_it_grows() -> None:
    found = ReasoningText(THINK)
    assert [found.push(text) for text in ("<think>", "a", " ", "b", "</", "think>", "\n", "c")] == [
        ("", ""), ("a", ""), ("", ""), (" b", ""), ("", ""), ("", ""), ("", ""), ("", "c"),
    ]  # fmt: skip


def test_a_tool_call_ends_reasoning_that_the_model_left_open() -> None:
    assert split("<think>a\n<tool_call>{}", [], enders=("<tool_call>",)) == ("a", "<tool_call>{}")
    assert split("[THINK]a[TOOL_CALLS]f{}", [14], marks=MISTRAL, enders=("[TOOL_CALLS]",)) == ("a", "[TOOL_CALLS]f{}")


def test_without_marks_all_is_the_answer() -> None:
    assert split("<think>a</think>b", [3], begun=True, marks=None) == ("", "<think>a</think>b")


@pytest.mark.parametrize(
    ("template", "marks"),
    [("{{ messages }}", None), ("{%- if '</think>' in content %}", THINK), ("<|Assistant|><think>\\n", THINK),
     ("[SYSTEM_PROMPT]First draft your thinking in [THINK]...[/THINK]", MISTRAL)],
)  # fmt: skip
def test_templates_tell_whether_a_model_reasons(template: str, marks: Marks | None) -> None:
    assert marks_of_template(template) == marks


def test_a_prompt_may_begin_the_reasoning() -> None:
    assert is_open("<|im_start|>assistant\n<think>\n", THINK)
    assert not is_open("<|im_start|>assistant\n<think>\n\n</think>\n\n", THINK), "Qwen3 with enable_thinking = false"
    assert not is_open("what does <think> mean?<|im_end|>\n<|im_start|>assistant\n", THINK)
