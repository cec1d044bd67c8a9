"""A tiny model whose tokenizer has marks as special tokens, with a chat template of a certain family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

# Special tokens in place of words of the tiny tokenizer, by id.
MARKS = {
    300: "<think>", 301: "</think>", 302: "<tool_call>", 303: "</tool_call>", 304: "[TOOL_CALLS]", 305: "[ARGS]",
    306: "<|python_tag|>", 307: "[THINK]", 308: "[/THINK]", 309: "[CALL_ID]",
}  # fmt: skip
IDS = {text: token_id for token_id, text in MARKS.items()}
# How each family's template writes calls, and how it begins an answer.
_CALLS = {
    "hermes": "<tool_call>{{ call | tojson }}</tool_call>",
    "llama3": "{# <|python_tag|> #}{{ call | tojson }}",
    "mistral": "[TOOL_CALLS]{{ call.name }}[ARGS]{{ call.arguments | tojson }}",
    "qwen3_coder": (
        "<tool_call><function={{ call.name }}>"
        "{% for name, value in call.arguments | items %}<parameter={{ name }}>{{ value }}</parameter>{% endfor %}"
        "</function></tool_call>"
    ),
}
_TEMPLATE = """\
{%% for message in messages %%}[{{ message.role }}] {{ message.content or '' }}\
{%% for tool in message.tool_calls or [] %%}{%% set call = tool.function %%}%s{%% endfor %%}
{%% endfor %%}[assistant] %s"""


def template(family: str, begin: str = "") -> str:
    return _TEMPLATE % (_CALLS[family], begin)


def make(source: Path, folder: Path, chat_template: str) -> Path:
    """A copy of the tiny model in `source`."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        if token["id"] in MARKS:
            token["content"], token["special"] = MARKS[token["id"]], True
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text(chat_template)
    return folder
