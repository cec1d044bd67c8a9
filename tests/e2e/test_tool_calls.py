"""Tool calls and reasoning of each family through proxy and engines: as a whole, streamed, after an engine's death."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from pdctl.proxy.answers.gather import Gathered
from tests.marked_model import IDS, make, template
from tests.service import Service, events, pid_of, running, single, temporary_run, topology

pytestmark = pytest.mark.e2e

TOOLS = [
    {"type": "function", "function": {"name": "weigh", "parameters": {
        "type": "object", "properties": {"kind": {"enum": ["cat", "dog"]}}, "required": ["kind"],
        "additionalProperties": False}}},
]  # fmt: skip
# A grammar for outputs with two free calls. The tiny model does not write calls by itself.
FREE = {
    "hermes": r'Well\.(<tool_call>\{"name": "weigh", "arguments": \{"kind": "[a-z]{90}"\}\}</tool_call>){2}',
    "llama3": r'\{"name": "weigh", "parameters": \{"kind": "[a-z]{90}"\}\}; '
    r'\{"name": "weigh", "parameters": \{"kind": "[a-z]{90}"\}\}',
    "mistral": r'Well\.(\[TOOL_CALLS\]weigh\[ARGS\]\{"kind": "[a-z]{90}"\}){2}',
    "qwen3_coder": "Well\\.(<tool_call>\n<function=weigh>\n<parameter=kind>\n[a-z]{90}\n</parameter>\n</function>\n"
    "</tool_call>){2}",
}
HELLO = [{"role": "user", "content": "hello"}]
# A turn with a call, as clients send it back. Mistral's ids have nine characters.
HISTORY = [
    *HELLO,
    {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [
        {"id": "abcdefghi", "type": "function", "function": {"name": "weigh", "arguments": '{"kind": "cat"}'}}]},
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "4 kg"},
]  # fmt: skip


@contextmanager
def serving(source: Path, family: str, begin: str = "", alone: bool = True) -> Iterator[Service]:
    with temporary_run() as run:
        model = make(source, run.folder / "marked", template(family, begin))
        # On every CPU the same answers: some tests need long ones.
        extra = 'dtype = "float32"'
        text = (single if alone else topology)(model=str(model), engine_extra=extra)
        with running(run, text.replace("[supervisor]", "[supervisor]\nmax_restarts = 100")) as service:
            yield service


def whole(service: Service, **fields: Any) -> dict[str, Any]:
    answer = service.client.post("/v1/chat/completions", json=body(**fields), headers={"x-request-id": "same"})
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["choices"][0])


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, "max_tokens": 400, "seed": 5, "temperature": 1, **fields}


def streamed(service: Service, kill: str | None = None, **fields: Any) -> dict[str, Any]:
    """The choice that a stream makes up. `kill`: the engine that dies after a few parts."""
    gathered, count = Gathered(chat=True, with_token_ids=False), 0
    asked = body(**fields, stream=True)
    headers = {"x-request-id": "same"}
    with service.client.stream("POST", "/v1/chat/completions", json=asked, headers=headers) as answer:
        for event in events(answer):
            for part in event["choices"] if event else []:
                assert "error" not in part
                gathered.add({name: msgspec.Raw(json.dumps(value).encode()) for name, value in part.items()}, [])
                count += 1
                if kill and count == 60:
                    core = psutil.Process(pid_of(service.process(kill))).children()[0]
                    os.kill(core.pid, signal.SIGKILL)
    found = {name: json.loads(bytes(value)) for name, value in gathered.choice().items()}
    assert count > 60 or not kill
    return found


def functions(choice: dict[str, Any]) -> list[tuple[str, str]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in choice["message"]["tool_calls"]]


@pytest.mark.parametrize("family", ["hermes", "llama3", "qwen3_coder"])
def test_calls_of_a_family(tiny_model: Path, family: str) -> None:
    with serving(tiny_model, family) as service:
        check_calls(service, family)


def check_calls(service: Service, family: str, **more: Any) -> None:
    forced: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", **more}
    for messages in (HELLO, HISTORY):
        choice = whole(service, **forced, messages=messages)
        ((name, arguments),) = functions(choice)
        assert (name, choice["finish_reason"]) == ("weigh", "tool_calls")
        assert json.loads(arguments)["kind"] in ("cat", "dog")
        assert streamed(service, **forced, messages=messages) == choice
    free: dict[str, Any] = {"tools": TOOLS, "guided_regex": FREE[family], **more}
    choice = whole(service, **free)
    assert [name for name, _ in functions(choice)] == ["weigh", "weigh"]
    assert [len(json.loads(arguments)["kind"]) for _, arguments in functions(choice)] == [90, 90]
    assert (choice["message"]["content"] or "") == ("Well." if "Well" in FREE[family] else "")
    assert choice["finish_reason"] == "tool_calls"
    assert streamed(service, **free) == choice
    first, second = (call["id"] for call in choice["message"]["tool_calls"])
    assert first != second
    assert len(functions(whole(service, **free, parallel_tool_calls=False))) == 1
    assert "tool_calls" not in whole(service, guided_regex=FREE[family], **more)["message"], "no tools were given"


# The prompt ends within reasoning, as with DeepSeek-R1, or after an empty one, as Qwen 3's if it should not think.
BEGIN = "{% if enable_thinking is defined and not enable_thinking %}[THINK][/THINK]{% else %}[THINK]{% endif %}"
AT_ONCE: dict[str, Any] = {"reasoning_effort": "none"}


@pytest.fixture(scope="module")
def service(tiny_model: Path) -> Iterator[Service]:
    """Mistral's calls, and reasoning that the prompt has begun."""
    with serving(tiny_model, "mistral", BEGIN, alone=False) as found:
        yield found


def test_calls_of_mistral(service: Service) -> None:
    check_calls(service, "mistral", **AT_ONCE)
    (call,) = whole(service, tools=TOOLS, tool_choice="required", **AT_ONCE)["message"]["tool_calls"]
    assert len(call["id"]) == 9
    assert call["id"].isalnum()


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
def test_a_death_in_the_middle_of_a_call_changes_nothing(service: Service, name: str) -> None:
    free: dict[str, Any] = {"tools": TOOLS, "guided_regex": FREE["mistral"], **AT_ONCE}
    quiet = whole(service, **free)
    service.healthy()
    before = service.process(name)
    assert streamed(service, kill=name, **free) == quiet
    service.restarted(before)
    service.healthy()


# Letters and the end of reasoning, of which the model samples one after the other.
LETTERS: dict[str, Any] = {
    "allowed_token_ids": [70, 71, 72, 73, IDS["[/THINK]"]],
    "logit_bias": {str(IDS["[/THINK]"]): -3},
}


def reasoned(service: Service, **fields: Any) -> dict[str, Any]:
    """An answer with both reasoning and text, of at least some length."""
    for seed in range(40):
        found = whole(service, **LETTERS, **fields, seed=seed, ignore_eos=True)
        if len(found["message"].get("reasoning", "")) > 8 and len(found["message"]["content"] or "") > 8:
            return {**found, "seed": seed}
    raise AssertionError("no seed gives an answer with both")


@pytest.mark.parametrize("max_tokens", [100, 200])
def test_reasoning_is_apart_from_the_answer(service: Service, max_tokens: int) -> None:
    """Short answers are requested as a whole, long ones are gathered from a stream."""
    choice = reasoned(service, max_tokens=max_tokens)
    seed, message = choice.pop("seed"), choice["message"]
    assert message["reasoning"] == message["reasoning_content"]
    assert len(message["reasoning"] + message["content"]) < max_tokens, "marks are tokens without text"
    asked: dict[str, Any] = {**LETTERS, "seed": seed, "ignore_eos": True, "max_tokens": max_tokens}
    assert streamed(service, **asked) == choice
    without = whole(service, **asked, include_reasoning=False)
    assert without == {**choice, "message": {"role": "assistant", "content": message["content"]}}
    assert streamed(service, **asked, include_reasoning=False) == without


def test_a_death_in_the_middle_of_reasoning_changes_nothing(service: Service) -> None:
    choice = reasoned(service, max_tokens=300)
    asked: dict[str, Any] = {**LETTERS, "seed": choice.pop("seed"), "ignore_eos": True, "max_tokens": 300}
    service.healthy()
    before = service.process("decode-0")
    assert streamed(service, kill="decode-0", **asked) == choice
    service.restarted(before)
    service.healthy()


def test_other_apis_have_reasoning_as_their_own_parts(service: Service) -> None:
    choice = reasoned(service, max_tokens=100)
    asked: dict[str, Any] = {**LETTERS, "seed": choice["seed"], "ignore_eos": True, "temperature": 1}
    answer = service.client.post("/v1/responses", json={**asked, "input": "hello", "max_output_tokens": 100})
    thought, text = answer.json()["output"]
    assert (thought["type"], thought["content"][0]["text"]) == ("reasoning", choice["message"]["reasoning"])
    assert text["content"][0]["text"] == choice["message"]["content"]
    answer = service.client.post("/v1/messages", json={**asked, "messages": HELLO, "max_tokens": 100})
    thought, text = answer.json()["content"]
    assert (thought["type"], thought["thinking"]) == ("thinking", choice["message"]["reasoning"])
    assert text["text"] == choice["message"]["content"]


def test_structured_output_comes_after_reasoning_that_the_prompt_began(service: Service) -> None:
    # The model soon ends its reasoning.
    asked: dict[str, Any] = {"guided_regex": "[ab]{5}", "logit_bias": {str(IDS["[/THINK]"]): 4}}
    found = whole(service, **asked)
    assert re.fullmatch("[ab]{5}", found["message"]["content"])
    assert found["message"]["reasoning"]
    assert found["finish_reason"] == "stop"
    assert streamed(service, **asked) == found
    call = whole(service, tools=TOOLS, tool_choice="required", logit_bias=asked["logit_bias"])
    assert call["message"]["reasoning"]
    assert functions(call)[0][0] == "weigh"
    unasked = whole(service, guided_regex="[ab]{5}", **AT_ONCE)["message"]
    assert re.fullmatch("[ab]{5}", unasked["content"])
    assert "reasoning" not in unasked


def test_a_death_before_structured_output_changes_nothing(service: Service) -> None:
    bias = {str(IDS["[/THINK]"]): 1}
    asked: dict[str, Any] = {"guided_regex": "[ab]{60}", "logit_bias": bias, "max_tokens": 900}
    quiet = whole(service, **asked, seed=11)
    assert len(quiet["message"]["reasoning"]) > 60, "the engine dies in it"
    assert re.fullmatch("[ab]{60}", quiet["message"]["content"])
    service.healthy()
    before = service.process("decode-0")
    assert streamed(service, kill="decode-0", **asked, seed=11) == quiet
    service.restarted(before)
    service.healthy()


def test_usage_counts_the_tokens_of_reasoning(service: Service) -> None:
    choice = reasoned(service, max_tokens=100)
    asked = body(**LETTERS, seed=choice["seed"], ignore_eos=True, max_tokens=100)
    answer = service.client.post("/v1/chat/completions", json=asked).json()
    # Each letter is a token, and the mark is none of them.
    count = len(choice["message"]["reasoning"])
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": count}
    assert answer["usage"]["completion_tokens"] == 100
    options = {"include_usage": True, "continuous_usage_stats": True}
    for given in ({"include_usage": True}, options):
        with service.client.stream(
            "POST", "/v1/chat/completions", json={**asked, "stream": True, "stream_options": given}
        ) as stream:
            usages = [event["usage"] for event in events(stream) if event and event.get("usage")]
        assert usages[-1]["completion_tokens_details"] == {"reasoning_tokens": count}
    told = [usage.get("completion_tokens_details", {}).get("reasoning_tokens", 0) for usage in usages]
    assert told == sorted(told)
    two = service.client.post("/v1/chat/completions", json={**asked, "n": 2}).json()["usage"]
    assert two["completion_tokens_details"]["reasoning_tokens"] > count
    reply = service.client.post("/v1/responses", json={
        **LETTERS, "seed": choice["seed"], "ignore_eos": True, "temperature": 1, "input": "hello",
        "max_output_tokens": 100,
    }).json()  # fmt: skip
    assert reply["usage"]["output_tokens_details"] == {"reasoning_tokens": count}


def test_the_parsers_can_be_chosen(service: Service) -> None:
    path = service.run.folder / "pdctl.toml"
    before = path.read_text()
    service.run.write(before.replace("[service]", '[service]\ntool_parser = "hermes"\nreasoning_parser = "none"'))
    try:
        service.run.cli("apply", check=True)
        service.healthy()
        found = whole(service, tools=TOOLS, guided_regex=FREE["mistral"])["message"]
        assert "tool_calls" not in found
        assert found["content"].startswith("Well.")
        assert len(functions(whole(service, tools=TOOLS, guided_regex=FREE["hermes"]))) == 2
        assert "reasoning" not in whole(service, **LETTERS, ignore_eos=True, max_tokens=100)["message"]
    finally:
        service.run.write(before)
        service.run.cli("apply", check=True)
