"""Third-party clients and the features they use: chats, tools, structured output, log probabilities."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import openai
import psutil
import pytest
from openai.types.chat import ChatCompletionMessageParam
from openai.types.shared_params import ResponseFormatJSONSchema

from tests.service import Run, Service, pid_of, running, topology

pytestmark = pytest.mark.e2e

SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["kind", "legs"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weigh", "description": "Weighs it", "parameters": SCHEMA}}]
FORMAT: ResponseFormatJSONSchema = {
    "type": "json_schema",
    "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True},
}
HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    text = topology("sample:tiny-chat", extra='api_keys = "keys.txt"')
    with running(module_run, text.replace("[supervisor]", "[supervisor]\nmax_restarts = 100")) as found:
        yield found


@pytest.fixture(scope="module", autouse=True)
def key(module_run: Run) -> str:
    """Called before the service starts, because its topology names the file."""
    done = module_run.cli("key", "tests", "--file", "keys.txt", check=True)
    return done.stdout.strip()


@pytest.fixture
def client(service: Service, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=0) as found:
        yield found
    service.idle()


def test_the_official_client(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["m"]
    whole = client.chat.completions.create(model="m", messages=HELLO, max_tokens=12, seed=3, temperature=0.7)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    stream = client.chat.completions.create(
        model="m", messages=HELLO, max_tokens=12, seed=3, temperature=0.7, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == (
        whole.choices[0].message.content
    )
    assert [chunk.choices[0].delta.role for chunk in chunks if chunk.choices].count("assistant") == 1
    assert chunks[-1].usage is not None
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(chunks[-1].usage, name) == getattr(whole.usage, name)
    assert chunks[-1].usage.prompt_tokens_details is not None
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens, "the same prompt was there already"
    assert len({chunk.id for chunk in chunks}) == len({chunk.created for chunk in chunks}) == 1


def test_the_official_client_async(service: Service, key: str) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=0) as client:
            asked = [client.completions.create(model="m", prompt="x", max_tokens=5, seed=n) for n in range(8)]
            answers = await asyncio.gather(*asked)
            assert all(answer.usage and answer.usage.completion_tokens == 5 for answer in answers)

    asyncio.run(main())


def test_keys_are_asked_for(service: Service) -> None:
    with (
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="unknown API key"),
    ):
        client.completions.create(model="m", prompt="x")
    assert service.client.get("/v1/models").status_code == 401
    assert service.client.get("/health").status_code == 200


@pytest.mark.parametrize("max_tokens", [100, 200])
def test_structured_output(client: openai.OpenAI, max_tokens: int) -> None:
    """Short answers are requested as a whole, long ones are gathered from a stream."""
    for seed in range(3):
        answer = client.chat.completions.create(
            model="m", messages=HELLO, response_format=FORMAT, max_tokens=max_tokens, seed=seed, temperature=1.0
        )
        found = json.loads(answer.choices[0].message.content or "")
        assert found["kind"] in ("cat", "dog")
        assert 0 <= found["legs"] <= 9
        assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weigh"}}])
@pytest.mark.parametrize("max_tokens", [120, 200])
def test_tools_are_called(client: openai.OpenAI, choice: Any, max_tokens: int) -> None:
    asked = {
        "model": "m",
        "messages": HELLO,
        "tools": TOOLS,
        "tool_choice": choice,
        "max_tokens": max_tokens,
        "seed": 1,
    }
    answer = client.chat.completions.create(**asked)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weigh"
    assert json.loads(call.function.arguments)["kind"] in ("cat", "dog")
    assert answer.choices[0].finish_reason == "tool_calls"
    chunks = list(client.chat.completions.create(**asked, stream=True))
    first, *more = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    same = call.id.replace(answer.id.removeprefix("chatcmpl-"), chunks[0].id.removeprefix("chatcmpl-"))
    assert (first.index, first.id, first.function.name) == (0, same, call.function.name)
    assert [(part.index, part.id, part.function.name) for part in more] == [(0, None, None)] * len(more)
    parts = [part.function.arguments for part in (first, *more)]
    assert "".join(parts) == call.function.arguments


@pytest.mark.parametrize("max_tokens", [8, 200])
def test_log_probabilities(client: openai.OpenAI, max_tokens: int) -> None:
    asked: dict[str, Any] = {"model": "m", "prompt": "abc", "max_tokens": max_tokens, "temperature": 0, "logprobs": 3}
    whole = client.completions.create(**asked, extra_body={"ignore_eos": True}).choices[0].logprobs
    assert len(whole.tokens) == len(whole.token_logprobs) == len(whole.top_logprobs) == max_tokens
    for token, logprob, top in zip(whole.tokens, whole.token_logprobs, whole.top_logprobs, strict=True):
        assert max(top.values()) == pytest.approx(logprob), "greedy takes the most likely"
        assert token in top
        assert 1 <= len(top) <= 4, "tokens of one text, such as broken characters, share an entry"
    chunks = list(client.completions.create(**asked, stream=True, extra_body={"ignore_eos": True}))
    streamed = [value for chunk in chunks for value in chunk.choices[0].logprobs.token_logprobs]
    assert streamed == pytest.approx(whole.token_logprobs, abs=1e-4)
    chat = client.chat.completions.create(
        model="m", messages=HELLO, max_tokens=max_tokens, logprobs=True, top_logprobs=2, temperature=0,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    told = chat.choices[0].logprobs
    assert told is not None
    entries = told.content
    assert entries is not None
    assert len(entries) == max_tokens
    assert all(len(entry.top_logprobs) == 2 and entry.top_logprobs[0].logprob <= 0 for entry in entries)


def test_several_answers(client: openai.OpenAI) -> None:
    found = client.completions.create(model="m", prompt=["a", "b"], n=2, seed=4, max_tokens=6)
    again = client.completions.create(model="m", prompt=["a", "b"], n=2, seed=4, max_tokens=6)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in found.choices}) == 4
    assert [choice.text for choice in again.choices] == [choice.text for choice in found.choices]
    texts = ["", "", "", ""]
    for chunk in client.completions.create(model="m", prompt=["a", "b"], n=2, seed=4, max_tokens=6, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in found.choices]


SIXTY = {"type": "array", "items": {"enum": ["aa", "bb", "cc"]}, "minItems": 60, "maxItems": 60}
LETTERS = {"type": "json_schema", "json_schema": {"name": "letters", "schema": SIXTY}}
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.8, "seed": 5, "presence_penalty": 0.5, "frequency_penalty": 0.4, "logprobs": 2},
    {"temperature": 0, "extra_body": {"repetition_penalty": 1.3, "min_tokens": 20, "top_k": 5}, "logprobs": 0},
    {"temperature": 1.0, "seed": 6, "logit_bias": {"65": 4.0}, "extra_body": {"min_p": 0.01}},
    {"temperature": 1.0, "seed": 9, "extra_body": {"response_format": LETTERS}},
]  # fmt: skip


@pytest.mark.parametrize(
    "options", [*(pytest.param(options, marks=pytest.mark.slow) for options in OPTIONS[:3]), OPTIONS[3]]
)
@pytest.mark.parametrize("stream", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_death_in_mid_answer_changes_nothing(
    client: openai.OpenAI, service: Service, options: dict[str, Any], stream: bool
) -> None:
    asked = {"model": "m", "prompt": "the quick brown fox " * 4, "max_tokens": 300, **options}
    extra = {**options.get("extra_body", {}), "return_token_ids": True}
    if "response_format" not in extra:
        extra["ignore_eos"] = True
    asked["extra_body"] = extra
    quiet = client.completions.create(**asked).choices[0]
    service.healthy()
    before = service.process("decode-0")
    pid = pid_of(before)
    if stream:
        logprobs: list[float | None] = []
        text, reason = "", None
        victim: int | None = pid
        for chunk in client.completions.create(**asked, stream=True):
            choice = chunk.choices[0]
            text += choice.text
            logprobs += choice.logprobs.token_logprobs if choice.logprobs else []
            reason = choice.finish_reason or reason
            if victim and len(text) > 25:
                os.kill(psutil.Process(victim).children()[0].pid, signal.SIGKILL)
                victim = None
        assert victim is None
    else:
        timer = threading.Timer(0.25, os.kill, [pid, signal.SIGKILL])
        timer.start()
        got = client.completions.create(**asked).choices[0]
        timer.join()
        text, reason = got.text, got.finish_reason
        logprobs = got.logprobs.token_logprobs if got.logprobs else []
    assert text == quiet.text
    assert reason == quiet.finish_reason
    if quiet.logprobs:
        assert logprobs == pytest.approx(quiet.logprobs.token_logprobs, abs=1e-3)
    service.restarted(before)
    service.healthy()


def test_tokens_and_back(service: Service, key: str) -> None:
    headers = {"authorization": f"Bearer {key}"}
    found = service.client.post("/tokenize", json={"prompt": "hello"}, headers=headers).json()
    assert found["count"] == 5
    back = service.client.post("/detokenize", json={"tokens": found["tokens"]}, headers=headers).json()
    assert back == {"prompt": "hello"}
    assert service.client.post("/tokenize", content=b"{", headers=headers).status_code == 400
