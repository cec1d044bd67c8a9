"""Records what vLLM's parsers make of texts, as recorded_vllm.json, which the tests compare with pdctl's parsers.

Run it with a Python that has vLLM; the recording in this folder was made with vLLM 0.32 (whole texts):

    python tests/engine/front/parsers/tool_calls/record_vllm.py tests/engine/front/parsers/tool_calls/recorded_vllm.json
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_SPECIALS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]",
    "[THINK]", "[/THINK]",
]  # fmt: skip
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"},
                                         "flags": {"type": "array"}}}}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]  # fmt: skip
TEXTS: dict[str, list[str]] = {
    "hermes": [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich 🌧", "days": 3}}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": {"city": "A"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        '<tool_call>{"arguments": {"city": "}\\"{"}, "name": "weather"}</tool_call>',
        "No call at all, only <b>text</b>.",
        "<tool_call>\nnot JSON\n</tool_call>",
    ],
    "llama3": [
        '{"name": "weather", "parameters": {"city": "Paris"}}',
        '<|python_tag|>{"name": "weather", "parameters": {"city": "Paris", "days": 2}}',
        '{"name": "weather", "parameters": {"city": "A"}}; {"name": "now", "parameters": {}}',
        '{"type": "function", "name": "weather", "parameters": {"city": "東京"}}',
        '{"name": "weather", "arguments": {"flags": [1, {"a": "}"}]}}',
        "The weather is fine.",
        '{"city": "Paris", "days": 3}',
    ],
    "mistral": [
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}]',
        '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "A"}}, {"name": "now", "arguments": {}}]',
        'Let me see.[TOOL_CALLS] [{"arguments": {"city": "Zürich 🌧"}, "name": "weather"}]',
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "]}["}}]',
        "No call at all.",
    ],
    "mistral_v11": [
        '[TOOL_CALLS]weather[ARGS]{"city": "Paris"}',
        '[TOOL_CALLS]weather[ARGS]{"city": "A"}[TOOL_CALLS]now[ARGS]{}',
        '[TOOL_CALLS]weather{"city": "東京", "days": 2}',
        'Let me see.[TOOL_CALLS]weather[ARGS]{"city": "x"}',
        "No call at all.",
    ],
    "qwen3_coder": [
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>",
        "Let me see.\n<tool_call>\n<function=weather>\n<parameter=city>\nZürich\n🌧\n</parameter>\n"
        "</function>\n</tool_call>",
        '<tool_call>\n<function=weather>\n<parameter=flags>\n[1, "a"]\n</parameter>\n</function>\n</tool_call>\n'
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "No call at all.",
    ],
    "think": [
        "<think>\nA long thought.\n</think>\n\nThe answer.",
        "<think>é 🌧</think>42",
        "<think>cut off",
    ],
}


class _Tokenizer:
    """As much of a tokenizer as the parsers use."""

    def __init__(self, without: str = "") -> None:
        self._vocab = {text: number for number, text in enumerate(_SPECIALS, 100) if text != without}
        self.all_special_tokens = list(self._vocab)
        self.all_special_ids = list(self._vocab.values())

    def get_vocab(self) -> dict[str, int]:
        return self._vocab

    def encode(self, text: str, **_: object) -> list[int]:
        return [self._vocab[text]] if text in self._vocab else [ord(letter) % 90 for letter in text]

    def convert_tokens_to_ids(self, text: str) -> int | None:
        return self._vocab.get(text)


def _vllm(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"vllm.{module}"), name)


def main(path: str) -> None:
    request = _vllm("entrypoints.openai.chat_completion.protocol", "ChatCompletionRequest")(
        messages=[], model="m", tools=TOOLS
    )
    hermes = _vllm("tool_parsers.hermes_tool_parser", "Hermes2ProToolParser")
    llama = _vllm("tool_parsers.llama_tool_parser", "Llama3JsonToolParser")
    mistral = _vllm("tool_parsers.mistral_tool_parser", "MistralToolParser")
    coder = _vllm("tool_parsers.qwen3_engine_tool_parser", "Qwen3EngineToolParser")
    kinds = {
        "hermes": (hermes, ""), "llama3": (llama, ""), "mistral": (mistral, "[ARGS]"), "mistral_v11": (mistral, ""),
        "qwen3_coder": (coder, ""),
    }  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {}
    for name, (kind, without) in kinds.items():
        for text in TEXTS[name]:
            told = kind(_Tokenizer(without), request.tools).extract_tool_calls(text, request)
            calls = [[call.function.name, call.function.arguments] for call in told.tool_calls]
            found.setdefault(name, []).append({"text": text, "content": told.content, "calls": calls})
    reasoning = _vllm("reasoning.deepseek_r1_reasoning_parser", "DeepSeekR1ReasoningParser")
    for text in TEXTS["think"]:
        thought, content = reasoning(_Tokenizer()).extract_reasoning(text, SimpleNamespace())
        found.setdefault("think", []).append({"text": text, "reasoning": thought, "content": content})
    Path(path).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
