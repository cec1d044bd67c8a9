"""OpenAI's Responses with its client, Anthropic's Messages, and endpoints that are not served, over real engines."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest
from openai.types.responses import ResponseFunctionToolCall

from tests.service import Run, Service, pid_of, running, topology

pytestmark = pytest.mark.e2e

Json = dict[str, Any]
SCHEMA: Json = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["kind", "legs"],
    "additionalProperties": False,
}
# Arguments of more tokens than an engine computes before a test kills it.
LETTERS: Json = {
    "type": "object",
    "properties": {"found": {"type": "array", "items": {"enum": ["aa", "bb"]}, "minItems": 40, "maxItems": 40}},
    "required": ["found"],
}
HELLO: Any = [{"role": "user", "content": "hello"}]
LONG = "the quick brown fox " * 4


def function(schema: Json) -> Any:
    """A tool of the Responses API."""
    return {"type": "function", "name": "weigh", "parameters": schema, "strict": True}


def tool(schema: Json) -> Json:
    """A tool of the Messages API."""
    return {"name": "weigh", "input_schema": schema}


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    module_run.cli("key", "tests", "--file", "keys.txt", check=True)
    text = topology("sample:tiny-chat", extra='api_keys = "keys.txt"')
    with running(module_run, text.replace("[supervisor]", "[supervisor]\nmax_restarts = 100")) as found:
        yield found


@pytest.fixture(scope="module")
def key(module_run: Run, service: Service) -> str:
    return module_run.cli("key", "more", "--file", "keys.txt", check=True).stdout.strip()


@pytest.fixture
def client(service: Service, key: str) -> Iterator[openai.OpenAI]:
    service.wait(lambda: _knows(service, key), what="the key to be known")
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=0) as found:
        yield found
    service.idle()


def _knows(service: Service, key: str) -> bool:
    return service.client.get("/v1/models", headers={"x-api-key": key}).status_code == 200


class Anthropic:
    """A client of the Messages API, as strict as the official one about the order of events."""

    def __init__(self, service: Service, key: str) -> None:
        headers = {"x-api-key": key, "anthropic-version": "2023-06-01"}
        self.http = httpx.Client(base_url=service.url, headers=headers, timeout=300, trust_env=False)

    def create(self, **fields: Any) -> Json:
        answer = self.http.post("/v1/messages", json={"model": "m", **fields})
        assert answer.status_code == 200, answer.text
        assert answer.headers["request-id"]
        return dict(answer.json())

    def events(self, **fields: Any) -> Iterator[Json]:
        with self.http.stream("POST", "/v1/messages", json={"model": "m", "stream": True, **fields}) as answer:
            assert answer.status_code == 200, answer.read()
            name = ""
            for line in answer.iter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    assert event["type"] == name
                    yield event

    def streamed(self, act: Callable[[str], None] = lambda _: None, **fields: Any) -> Json:
        """The message put together from its events. `act` is called with all that was said after each of them."""
        message: Json = {}
        said = ""
        inputs: dict[int, str] = {}
        for event in self.events(**fields):
            match event["type"]:
                case "message_start":
                    message = event["message"]
                case "content_block_start":
                    message["content"].append(event["content_block"])
                case "content_block_delta":
                    more = next(text for name, text in event["delta"].items() if name != "type")
                    said += more
                    block = message["content"][event["index"]]
                    if block["type"] == "text":
                        block["text"] += more
                    else:
                        inputs[event["index"]] = inputs.get(event["index"], "") + more
                    act(said)
                case "message_delta":
                    message |= {**event["delta"], "usage": event["usage"]}
                case "message_stop":
                    for index, text in inputs.items():
                        message["content"][index]["input"] = json.loads(text)
                    return message
                case kind:
                    assert kind in ("content_block_stop", "ping"), event
        raise AssertionError("the stream ended without message_stop")


@pytest.fixture
def anthropic(service: Service, key: str, client: openai.OpenAI) -> Iterator[Anthropic]:
    found = Anthropic(service, key)
    with found.http:
        yield found


class Killer:
    """Kills the decode engine's core once, when enough was said."""

    def __init__(self, service: Service, after: int) -> None:
        service.healthy()
        self._service = service
        self._before = service.process("decode-0")
        self._after = after
        self.killed = False

    def __call__(self, said: str) -> None:
        if not self.killed and len(said) > self._after:
            self.killed = True
            os.kill(psutil.Process(pid_of(self._before)).children()[0].pid, signal.SIGKILL)

    def check(self) -> None:
        """The engine died while the stream ran, and is back."""
        assert self.killed
        self._service.restarted(self._before)
        self._service.healthy()


def same(message: Json) -> Json:
    """A message without its ids, which differ between requests, and with all tokens of its prompt counted together."""
    content = [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]
    usage = {"output_tokens": message["usage"]["output_tokens"], "input_tokens": whole_prompt(message["usage"])}
    return {**{name: value for name, value in message.items() if name != "id"}, "content": content, "usage": usage}


def whole_prompt(usage: Json) -> int:
    """Tokens of a prompt: Anthropic's API counts those from the cache apart."""
    return int(usage["input_tokens"]) + int(usage.get("cache_read_input_tokens", 0))


# -- responses -----------------------------------------------------------------------------------------------


def test_a_response_is_the_chats_answer(client: openai.OpenAI) -> None:
    options: Json = {"temperature": 0.7, "extra_body": {"seed": 3}}
    chat = client.chat.completions.create(model="m", messages=HELLO, max_tokens=12, **options)
    whole = client.responses.create(model="m", input="hello", max_output_tokens=12, store=False, **options)
    assert whole.output_text == chat.choices[0].message.content
    assert (whole.status, whole.error) == ("incomplete", None)
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert chat.usage is not None
    assert whole.usage is not None
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (chat.usage.prompt_tokens, 12)
    with client.responses.stream(model="m", input="hello", max_output_tokens=12, **options) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage == whole.usage
    counted = client.responses.input_tokens.count(model="m", input="hello")
    assert counted.input_tokens == whole.usage.input_tokens


@pytest.mark.parametrize("max_tokens", [100, 200])
def test_structured_output_of_a_response(client: openai.OpenAI, max_tokens: int) -> None:
    """Short answers are requested as a whole, long ones are gathered from a stream."""
    form: Any = {"format": {"type": "json_schema", "name": "animal", "schema": SCHEMA, "strict": True}}
    found = client.responses.create(
        model="m", input="hello", text=form, max_output_tokens=max_tokens, extra_body={"seed": 1}
    )
    assert json.loads(found.output_text)["kind"] in ("cat", "dog")
    assert found.status == "completed"


def test_a_tools_result_goes_back_with_the_output(client: openai.OpenAI) -> None:
    asked: Json = {"model": "m", "max_output_tokens": 200, "tools": [function(SCHEMA)], "tool_choice": "required",
                   "extra_body": {"seed": 1}}  # fmt: skip
    first = client.responses.create(input="hello", **asked)
    [called] = first.output
    assert isinstance(called, ResponseFunctionToolCall)
    assert (called.name, first.status) == ("weigh", "completed")
    assert json.loads(called.arguments)["kind"] in ("cat", "dog")
    with client.responses.stream(input="hello", **asked) as stream:
        stream.until_done()
        [again] = stream.get_final_response().output
    assert isinstance(again, ResponseFunctionToolCall)
    assert again.arguments == called.arguments
    items: Any = [
        *HELLO, *(item.model_dump(exclude_none=True) for item in first.output),
        {"type": "function_call_output", "call_id": called.call_id, "output": "heavy"},
    ]  # fmt: skip
    then = client.responses.create(
        model="m", input=items, tools=[function(SCHEMA)], max_output_tokens=12, temperature=0, tool_choice="auto"
    )
    calls = [{"id": called.call_id, "type": "function",
              "function": {"name": "weigh", "arguments": called.arguments}}]  # fmt: skip
    messages: Any = [
        *HELLO, {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": called.call_id, "content": "heavy"},
    ]  # fmt: skip
    chat_tool: Any = {"type": "function", "function": {"name": "weigh", "parameters": SCHEMA, "strict": True}}
    chat = client.chat.completions.create(model="m", messages=messages, tools=[chat_tool], max_tokens=12, temperature=0)
    assert then.output_text == chat.choices[0].message.content


def test_a_death_in_the_middle_of_a_response(client: openai.OpenAI, service: Service) -> None:
    asked: Json = {"model": "m", "input": LONG, "max_output_tokens": 300, "temperature": 0.8,
                   "extra_body": {"seed": 5, "ignore_eos": True}}  # fmt: skip
    quiet = client.responses.create(**asked)
    killer, said = Killer(service, 25), ""
    with client.responses.stream(**asked) as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                said += event.delta
                killer(said)
        assert event.type == "response.incomplete"
    killer.check()
    assert said == event.response.output_text == quiet.output_text
    assert event.response.usage is not None
    assert quiet.usage is not None
    assert event.response.usage.input_tokens == quiet.usage.input_tokens
    assert event.response.usage.output_tokens == quiet.usage.output_tokens


@pytest.mark.slow
def test_a_death_in_the_middle_of_a_responses_tool_call(client: openai.OpenAI, service: Service) -> None:
    asked: Json = {"model": "m", "input": LONG, "max_output_tokens": 600, "tools": [function(LETTERS)],
                   "tool_choice": "required", "extra_body": {"seed": 5}}  # fmt: skip
    [quiet] = client.responses.create(**asked).output
    killer, said = Killer(service, 25), ""
    with client.responses.stream(**asked) as stream:
        for event in stream:
            if event.type == "response.function_call_arguments.delta":
                said += event.delta
                killer(said)
        [called] = stream.get_final_response().output
    killer.check()
    assert isinstance(called, ResponseFunctionToolCall)
    assert isinstance(quiet, ResponseFunctionToolCall)
    assert called.arguments == quiet.arguments == said


def test_nothing_is_stored(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="stores no responses") as refused:
        client.responses.create(model="m", input="x", previous_response_id="resp_1")
    assert refused.value.param == "previous_response_id"
    for act in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError, match="stores no responses"):
            act("resp_1")


def test_errors_of_engines_name_the_apis_fields(client: openai.OpenAI) -> None:
    for fields, param in (
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"not": {}}}}}, "text.format"),
    ):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as refused:
                client.responses.create(model="m", input="x", stream=stream, extra_body=fields)
            assert refused.value.param == param


def test_unknown_fields_of_a_response_are_reported(client: openai.OpenAI) -> None:
    raw = client.responses.with_raw_response.create(
        model="m", input="x", max_output_tokens=2, extra_body={"invented": 1, "reasoning": {"summary": "auto"}}
    )
    assert raw.headers["x-pdctl-ignored-fields"] == "invented, reasoning.summary"


# -- messages ------------------------------------------------------------------------------------------------


def test_a_message_is_the_chats_answer(client: openai.OpenAI, anthropic: Anthropic) -> None:
    chat = client.chat.completions.create(
        model="m",
        messages=HELLO,
        max_tokens=12,
        temperature=0.7,
        seed=3,
    )
    asked: Json = {"messages": HELLO, "max_tokens": 12, "temperature": 0.7, "seed": 3}
    whole = anthropic.create(**asked)
    assert whole["content"] == [{"type": "text", "text": chat.choices[0].message.content}]
    assert (whole["stop_reason"], whole["stop_sequence"], whole["role"]) == ("max_tokens", None, "assistant")
    assert chat.usage is not None
    assert (whole_prompt(whole["usage"]), whole["usage"]["output_tokens"]) == (chat.usage.prompt_tokens, 12)
    assert whole["usage"]["cache_read_input_tokens"] > 0, "the chat had the same prompt"
    assert same(anthropic.streamed(**asked)) == same(whole)
    start = next(anthropic.events(**asked))
    assert whole_prompt(start["message"]["usage"]) == chat.usage.prompt_tokens
    assert start["message"]["usage"]["cache_read_input_tokens"] > 0, "as at the end of the stream"
    counted = anthropic.http.post("/v1/messages/count_tokens", json={"model": "m", "messages": HELLO})
    assert counted.json() == {"input_tokens": chat.usage.prompt_tokens}


def test_the_stop_sequence_is_named(anthropic: Anthropic) -> None:
    asked: Json = {"messages": HELLO, "max_tokens": 24, "temperature": 0}
    [block] = anthropic.create(**asked)["content"]
    stop = block["text"][6:8]
    for found in (
        anthropic.create(**asked, stop_sequences=["never said", stop]),
        anthropic.streamed(**asked, stop_sequences=["never said", stop]),
    ):
        assert found["content"][0]["text"] == block["text"][: block["text"].find(stop)]
        assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", stop)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weigh"}], ids=["any", "by name"])
def test_a_message_uses_a_tool(anthropic: Anthropic, choice: Json) -> None:
    asked: Json = {"messages": HELLO, "max_tokens": 200, "tools": [tool(SCHEMA)], "tool_choice": choice, "seed": 1}
    whole = anthropic.create(**asked)
    [used] = whole["content"]
    assert (used["type"], used["name"], whole["stop_reason"]) == ("tool_use", "weigh", "tool_use")
    assert used["input"]["kind"] in ("cat", "dog")
    assert same(anthropic.streamed(**asked)) == same(whole)
    result = {"type": "tool_result", "tool_use_id": used["id"], "content": "heavy"}
    messages = [*HELLO, {"role": "assistant", "content": whole["content"]}, {"role": "user", "content": [result]}]
    then = anthropic.create(messages=messages, tools=[tool(SCHEMA)], max_tokens=4)
    assert then["usage"]["output_tokens"] == 4


def test_an_answer_continues_the_last_message(anthropic: Anthropic) -> None:
    asked: Json = {"max_tokens": 12, "temperature": 0}
    begun = [*HELLO, {"role": "assistant", "content": "The answer is"}]
    ended = [*begun, {"role": "user", "content": "x"}]
    assert (
        whole_prompt(anthropic.create(messages=begun, **asked)["usage"])
        < whole_prompt(anthropic.create(messages=ended, **asked)["usage"])
    )


@pytest.mark.parametrize("with_tool", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_death_in_the_middle_of_a_message(anthropic: Anthropic, service: Service, with_tool: bool) -> None:
    asked: Json = {"messages": [{"role": "user", "content": LONG}], "max_tokens": 600 if with_tool else 300,
                   "temperature": 0.8, "seed": 5}  # fmt: skip
    asked |= {"tools": [tool(LETTERS)], "tool_choice": {"type": "any"}} if with_tool else {"ignore_eos": True}
    quiet = anthropic.create(**asked)
    killer = Killer(service, 25)
    assert same(anthropic.streamed(killer, **asked)) == same(quiet)
    killer.check()


@pytest.mark.parametrize(
    ("method", "fields", "status", "kind", "message"),
    [
        ("POST", {"max_tokens": None}, 400, "invalid_request_error", "max_tokens: is missing"),
        ("POST", {"model": "other"}, 404, "not_found_error", "does not exist"),
        ("POST", {"max_tokens": 10**6}, 400, "invalid_request_error", "this model's context is"),
        ("POST", {"stop_sequences": ["x"] * 17}, 400, "invalid_request_error", "stop_sequences takes up to 16"),
        ("GET", {}, 405, "invalid_request_error", "takes POST"),
    ],
    ids=["no limit", "model", "context", "stops", "method"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_anthropics_form(
    anthropic: Anthropic, method: str, fields: Json, status: int, kind: str, message: str, stream: bool
) -> None:
    body = {"model": "m", "messages": HELLO, "max_tokens": 4, "stream": stream, **fields}
    answer = anthropic.http.request(method, "/v1/messages", json=body)
    told = answer.json()
    assert (answer.status_code, told["type"], told["error"]["type"]) == (status, "error", kind)
    assert message in told["error"]["message"]
    assert told["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]


def test_keys_of_messages(service: Service, anthropic: Anthropic, key: str) -> None:
    body = {"model": "m", "messages": HELLO, "max_tokens": 1}
    for headers, status in (
        ({}, 401), ({"x-api-key": "wrong"}, 401), ({"x-api-key": key}, 200), ({"authorization": f"Bearer {key}"}, 200),
        ({"authorization": f"Bearer {key}", "x-api-key": "wrong"}, 200),
        ({"authorization": "Bearer wrong", "x-api-key": key}, 200),
    ):  # fmt: skip
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            answer = service.client.post(path, json=body, headers=headers)
            assert answer.status_code == status
            if status == 401:
                assert answer.json()["error"]["type"] == "authentication_error"


# -- what is not served --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("/v1/embeddings", "embeddings"), ("/v1/audio/speech", "audio"), ("/v1/images/generations", "images"),
        ("/v1/moderations", "moderation"), ("/v1/files", "files"), ("/v1/batches/b1", "batches"),
        ("/v1/rerank", "reranking"), ("/v1/score", "scoring"), ("/v1/assistants", "assistants"),
        ("/v1/threads/t1/runs", "threads"), ("/v1/fine_tuning/jobs", "fine-tuning"), ("/v1/realtime", "realtime"),
    ],
)  # fmt: skip
def test_endpoints_that_are_not_served_are_named(service: Service, path: str, named: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        answer = service.client.request(method, path)
        told = answer.json()["error"]
        assert (answer.status_code, told["code"], told["type"]) == (404, 404, "invalid_request_error")
        assert f"{method} {path}: this service has no {named}" in told["message"]
        assert "/v1/chat/completions" in told["message"]


def test_other_paths_are_just_not_found(service: Service) -> None:
    for path in ("/nothing", "/v1/embeddingsx", "/v1/filesystem"):
        assert service.client.get(path).json()["error"]["message"] == f"GET {path}: Not Found"
    told = service.client.post("/v1/messages/batches").json()
    assert (told["type"], told["error"]["type"]) == ("error", "not_found_error")
