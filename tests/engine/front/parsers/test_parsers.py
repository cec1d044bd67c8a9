from __future__ import annotations

import pytest

from pdctl.engine.front.api.parsers import choose
from pdctl.engine.front.api.parsers.reasoning import MISTRAL, THINK
from pdctl.engine.front.api.parsers.tool_calls import family
from pdctl.names.parsers import REASONING_PARSERS, TOOL_FAMILIES, TOOL_PARSERS

# How the families' templates write calls, in short. The marks are those of vLLM's examples/tool_chat_template_*.jinja
# for hermes, llama3.1_json, llama3.2_json, mistral3 and qwen3coder.
TEMPLATES = {
    "hermes": 'return a JSON object within tags: <tool_call>{"name": <f>, "arguments": <a>}</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=example>\n<parameter=first>\nvalue\n</parameter>\n</function>\n</tool_call>",
    "mistral": "[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS][TOOL_CALLS] [",
    "llama3": '<|start_header_id|>system<|end_header_id|> Respond with {"name": function, "parameters": dictionary}.',
}


@pytest.mark.parametrize("name", TOOL_FAMILIES)
def test_the_chat_template_tells_the_family(name: str) -> None:
    assert choose("auto", "auto", TEMPLATES[name]).family is family(name)


def test_llama_31_names_its_tag() -> None:
    assert choose("auto", "auto", "{{ '<|python_tag|>' + tool_call.name }}").family is family("llama3")


def test_a_template_that_tells_nothing_is_read_like_hermes() -> None:
    assert choose("auto", "auto", "{{ messages }}").family is family("hermes")


@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_a_name_counts_more_than_the_template(name: str) -> None:
    found = choose(name, "none", TEMPLATES["mistral"]).family
    assert found is {"auto": family("mistral"), "none": None}.get(name, family(name) if name in TOOL_FAMILIES else None)


@pytest.mark.parametrize("name", REASONING_PARSERS)
def test_reasoning_by_name(name: str) -> None:
    expected = {"auto": MISTRAL, "mistral": MISTRAL, "think": THINK, "none": None}
    assert choose("none", name, "[THINK]").marks == expected[name]
