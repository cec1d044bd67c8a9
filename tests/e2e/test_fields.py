"""Fields of OpenAI's and vLLM's API, through a prefill and a decode engine: streamed, unstreamed, and refused ones."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest

from pdctl.proxy.answers.gather import Gathered
from tests.service import Engine, Run, Service, events, running, topology

pytestmark = pytest.mark.e2e

SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
CHOICES = ["yes.", "no (not now)", "a|b"]


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    with running(module_run, topology(model="sample:tiny-chat")) as found:
        yield found


def whole(service: Service, **fields: Any) -> dict[str, Any]:
    answer = service.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 24, "temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["choices"][0])


def streamed(service: Service, **fields: Any) -> tuple[str, str | None]:
    body = {"prompt": "x", "max_tokens": 24, "temperature": 0, "stream": True, **fields}
    text, reason = "", None
    with service.client.stream("POST", "/v1/completions", json=body) as answer:
        for event in events(answer):
            for choice in event["choices"] if event else []:
                text, reason = text + choice["text"], choice["finish_reason"] or reason
    return text, reason


def both(service: Service, **fields: Any) -> tuple[str, str | None]:
    one = whole(service, **fields)
    assert (one["text"], one["finish_reason"]) == streamed(service, **fields)
    return one["text"], one["finish_reason"]


@pytest.mark.parametrize(
    "fields",
    [{"prompt_cache_key": "k", "safety_identifier": "s", "verbosity": "low", "reasoning_effort": "high"},
     {"modalities": ["text"], "service_tier": None, "user": None, "stop": None, "logit_bias": None, "n": None,
      "structured_outputs": None, "guided_json": None, "stop_token_ids": None, "stream_options": None}],
)  # fmt: skip
def test_neutral_fields_change_nothing(service: Service, fields: dict[str, Any]) -> None:
    assert whole(service, **fields) == whole(service)


def test_stop_token_ids_end_like_the_models_own_end(service: Service) -> None:
    ids = service.complete("x", max_tokens=24)["token_ids"]
    at = next(n for n in range(3, 24) if ids[n] not in ids[:n])
    for ask in (service.complete, service.stream):
        found = ask("x", max_tokens=24, stop_token_ids=[ids[at]], ignore_eos=True)
        assert (found["token_ids"], found["finish_reason"]) == (ids[: at + 1], "stop")
    later = service.complete("x", max_tokens=24, stop_token_ids=[ids[at]], min_tokens=at + 4)["token_ids"]
    assert ids[at] not in later[: at + 3]


def test_only_allowed_tokens_come(service: Service) -> None:
    ids = service.complete("x", max_tokens=16, allowed_token_ids=[70, 71, 72], ignore_eos=True)["token_ids"]
    assert set(ids) <= {70, 71, 72}
    assert service.stream("x", max_tokens=16, allowed_token_ids=[70, 71, 72], ignore_eos=True)["token_ids"] == ids


def test_the_stop_string_stays_where_that_is_wanted(service: Service) -> None:
    text = whole(service)["text"]
    stop = text[5:7]
    assert both(service, stop=stop)[0] == text[: text.find(stop)]
    assert both(service, stop=stop, include_stop_str_in_output=True)[0] == text[: text.find(stop) + 2]


@pytest.mark.parametrize(
    "fields",
    [{"guided_choice": CHOICES}, {"structured_outputs": {"choice": CHOICES}}],
    ids=str,
)
def test_one_of_the_choices_comes(service: Service, fields: dict[str, Any]) -> None:
    observed = {both(service, **fields, temperature=2.0, seed=seed) for seed in range(8)}
    assert {text for text, _ in observed} <= set(CHOICES)
    assert len(observed) > 1
    assert {reason for _, reason in observed} == {"stop"}


@pytest.mark.parametrize(
    "fields",
    [{"guided_json": SCHEMA}, {"guided_json": json.dumps(SCHEMA)}, {"structured_outputs": {"json": SCHEMA}}],
    ids=str,
)
def test_json_by_a_schema(service: Service, fields: dict[str, Any]) -> None:
    text, _ = both(service, **fields, max_tokens=200)
    assert json.loads(text)["ok"] in (True, False)


def test_patterns_and_grammars(service: Service) -> None:
    assert re.fullmatch("[a-c]{4}-[0-9]{2}", both(service, guided_regex="[a-c]{4}-[0-9]{2}")[0])
    assert re.fullmatch("(ab)+", both(service, guided_grammar='root ::= "ab" | "ab" root', max_tokens=100)[0])
    assert both(service, structured_outputs={"json_object": True})[0].startswith("{")


def test_the_last_tokens_of_a_prompt(service: Service) -> None:
    tail = service.complete("klm", max_tokens=8)["token_ids"]
    ids = service.client.post("/tokenize", json={"prompt": "abcdefghijklm"}).json()["tokens"]
    for prompt in ("abcdefghijklm", ids):
        found = service.complete(prompt, max_tokens=8, truncate_prompt_tokens=3)
        assert (found["token_ids"], found["usage"]["prompt_tokens"]) == (tail, 3)


def test_variables_of_a_chat_template(service: Service) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}

    def prompt_tokens(**fields: Any) -> int:
        answer = service.client.post("/v1/chat/completions", json={**body, **fields})
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["prompt_tokens"])

    assert prompt_tokens(chat_template_kwargs={"unheard_of": 1}) == prompt_tokens()
    assert prompt_tokens(add_generation_prompt=False) < prompt_tokens()
    assert prompt_tokens(function_call="none") == prompt_tokens()


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"stop_token_ids": [100_000]}, "stop_token_ids"), ({"allowed_token_ids": []}, "allowed_token_ids"),
     ({"guided_regex": "(?=a)a"}, "guided_regex"), ({"guided_choice": []}, "guided_choice"),
     ({"guided_json": "{"}, "guided_json"), ({"guided_json": {"type": "array", "contains": {}}}, "guided_json"),
     ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_regex"),
     ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
     ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"), ({"modalities": ["audio"]}, "modalities"),
     ({"bad_words": [""]}, "bad_words"), ({"prompt_logprobs": 21}, "prompt_logprobs"),
     ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs")],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_by_name(service: Service, fields: dict[str, Any], param: str) -> None:
    answer = service.client.post("/v1/completions", json={"prompt": "x", **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_bad_words_do_not_come(service: Service) -> None:
    ids = service.complete("x", max_tokens=24, ignore_eos=True)["token_ids"]

    def written(*token_ids: int) -> str:
        return str(service.client.post("/detokenize", json={"tokens": token_ids}).json()["prompt"])

    def read(text: str) -> list[int]:
        body = {"prompt": text, "add_special_tokens": False}
        return list(service.client.post("/tokenize", json=body).json()["tokens"])

    for length in (1, 2):
        at = next(n for n in range(2, 20) if read(written(*ids[n : n + length])) == ids[n : n + length])
        bad = ids[at : at + length]
        for ask in (service.complete, service.stream):
            found = ask("x", max_tokens=24, ignore_eos=True, bad_words=[written(*bad)])["token_ids"]
            assert bad not in [found[n : n + length] for n in range(24)]
        assert both(service, bad_words=[written(*bad)])


def test_the_prompt_comes_first_where_an_echo_is_wanted(service: Service) -> None:
    text = whole(service)["text"]
    assert both(service, echo=True)[0] == f"x{text}"
    assert both(service, echo=True, max_tokens=200)[0].startswith(f"x{text}"), "not in one piece"
    ids = service.client.post("/tokenize", json={"prompt": "x"}).json()["tokens"]
    assert both(service, prompt=ids, echo=True)[0] == f"x{text}"
    found = whole(service, echo=True, logprobs=2, prompt="abc", max_tokens=3)
    told = found["logprobs"]
    assert "".join(told["tokens"][:3]) == "abc"
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["text_offset"]) == 6
    assert (told["token_logprobs"][0], told["top_logprobs"][0]) == (None, None)
    assert [found["text"][at] for at in told["text_offset"][:3]] == list("abc")
    assert all(len(top) >= 2 for top in told["top_logprobs"][1:])


@pytest.mark.parametrize("prompt", ["x", "abc " * 150])
def test_what_the_model_thought_of_a_prompt_is_what_it_thinks_of_an_answer(service: Service, prompt: str) -> None:
    answer = service.complete(prompt, max_tokens=6, logprobs=3, ignore_eos=True)
    ids = service.client.post("/tokenize", json={"prompt": prompt}).json()["tokens"]
    whole = service.complete([*ids, *answer["token_ids"]], max_tokens=2, prompt_logprobs=3)
    told = whole["prompt_logprobs"]
    assert told[0] is None
    assert len(told) == len(ids) + 6
    for token, one, entry in zip(answer["token_ids"], answer["logprobs"]["token_logprobs"], told[-6:], strict=True):
        assert entry[str(token)]["logprob"] == pytest.approx(one, abs=1e-4)
        assert entry[str(token)]["rank"] == 1, "the answer was greedy"
        assert len(entry) == 3
    many = service.client.post("/v1/completions", json={"prompt": [prompt, "y"], "prompt_logprobs": 0, "max_tokens": 1})
    assert [len(choice["prompt_logprobs"]) for choice in many.json()["choices"]] == [len(ids), 1]


def chat(service: Service, **fields: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, "temperature": 0, **fields}
    answer = service.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_of_a_chats_prompt_is_told_beside_the_choices(service: Service) -> None:
    found = chat(service, prompt_logprobs=1)
    assert len(found["prompt_logprobs"]) == found["usage"]["prompt_tokens"]
    assert "prompt_logprobs" not in found["choices"][0]


def test_an_answer_goes_on_with_the_last_message(service: Service) -> None:
    begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "So it"}]
    plain = {"messages": begun, "add_generation_prompt": False}
    found = chat(service, **plain, continue_final_message=True)
    echoed = chat(service, **plain, continue_final_message=True, echo=True)
    text = found["choices"][0]["message"]["content"]
    assert echoed["choices"][0]["message"]["content"] == f"So it{text}"
    tokenized = service.client.post("/tokenize", json={**plain, "continue_final_message": True})
    assert tokenized.json()["count"] == found["usage"]["prompt_tokens"]
    shown = service.client.post("/detokenize", json={"tokens": tokenized.json()["tokens"]}).json()["prompt"]
    assert shown.endswith("[assistant] So it")
    both_ways = {"messages": begun, "max_tokens": 1, "continue_final_message": True, "add_generation_prompt": True}
    assert service.client.post("/v1/chat/completions", json=both_ways).status_code == 400


def test_every_event_counts_where_that_is_wanted(service: Service) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for path, start in (("/v1/completions", {"prompt": "xyz"}),
                        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})):  # fmt: skip
        body = {**start, "max_tokens": 9, "ignore_eos": True, "stream": True, "stream_options": options, "n": 2}
        with service.client.stream("POST", path, json=body) as answer:
            found = [event for event in events(answer) if event]
        observed: dict[int, list[int]] = {0: [], 1: []}
        for event in found[:-1]:
            observed[event["choices"][0]["index"]].append(event["usage"]["completion_tokens"])
            assert event["usage"]["prompt_tokens"] == found[-1]["usage"]["prompt_tokens"] > 0
        assert all(counts == sorted(counts) and counts[-1] == 9 for counts in observed.values())
        assert found[-1]["usage"]["completion_tokens"] == 18


def test_arguments_of_a_tool_call_come_while_they_grow(service: Service) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "minLength": 30, "maxLength": 40}},
              "required": ["a"]}  # fmt: skip
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [tool], "tool_choice": "required",
            "max_tokens": 300, "temperature": 0}  # fmt: skip
    whole_call = chat(service, **body)["choices"][0]["message"]["tool_calls"][0]
    with service.client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
        deltas = [event["choices"][0]["delta"] for event in events(answer) if event and event["choices"]]
    parts = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert all(len(delta.get("tool_calls", [])) <= 1 for delta in deltas), "clients take two parts for two calls"
    assert len(parts) > 10
    assert [part["function"].get("name") for part in parts] == ["f", *[None] * (len(parts) - 1)]
    assert "".join(part["function"]["arguments"] for part in parts) == whole_call["function"]["arguments"]
    assert 30 <= len(json.loads(whole_call["function"]["arguments"])["a"]) <= 40


TOOL = {"type": "function", "function": {"name": "f", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}}  # fmt: skip
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "x", "logprobs": 3}),
        ("/v1/completions", {"prompt": "x", "stop": "<3", "logprobs": 0, "echo": True}),
        ("/v1/completions", {"prompt": [5, 6, 7], "guided_regex": "[ab]{5}", "include_stop_str_in_output": True}),
        ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2}),
        ("/v1/chat/completions", {**CHAT, "tools": [TOOL], "tool_choice": "required"}),
        ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_object"}}),
    ],
    ids=str,
)
def test_every_way_to_an_answer_gives_the_same_fields(service: Service, path: str, fields: dict[str, Any]) -> None:
    """One engine alone; the proxy's answer as a whole, gathered from parts, and streamed."""
    body = {**fields, "max_tokens": 100, "temperature": 0, "seed": 5}
    named = {"x-request-id": "same"}

    def choice(client: httpx.Client, **more: Any) -> dict[str, Any]:
        answer = client.post(path, json={**body, **more}, headers=named)
        assert answer.status_code == 200, answer.text
        return dict(answer.json()["choices"][0])

    with Engine(service, "decode-0").http as engine:
        alone = choice(engine)
    in_one_piece = choice(service.client)
    from_parts = choice(service.client, return_token_ids=True)
    gathered = Gathered("chat" in path, with_token_ids=True)
    with service.client.stream(
        "POST", path, json={**body, "stream": True, "return_token_ids": True}, headers=named
    ) as answer:
        for event in events(answer):
            for part in event["choices"] if event else []:
                ids = part.pop("token_ids")
                del part["index"]
                gathered.add({name: msgspec.Raw(json.dumps(value).encode()) for name, value in part.items()}, ids)
    streamed_parts = {name: json.loads(bytes(value)) for name, value in gathered.choice().items()}
    assert in_one_piece == alone
    assert streamed_parts.pop("token_ids") == from_parts.pop("token_ids")
    assert from_parts == alone
    assert {"index": 0, **streamed_parts} == alone


def test_packed_bodies_are_unpacked(service: Service) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 24, "temperature": 0}).encode()
    headers = {"content-type": "application/json"}
    for name, packed in (("gzip", gzip.compress(body)), ("deflate", zlib.compress(body))):
        answer = service.client.post("/v1/completions", content=packed, headers={**headers, "content-encoding": name})
        assert answer.json()["choices"][0]["text"] == whole(service)["text"]
    packed = gzip.compress(b'{"prompt": "abc"}')
    answer = service.client.post("/tokenize", content=packed, headers={**headers, "content-encoding": "gzip"})
    assert answer.json()["count"] == 3
    answer = service.client.post("/v1/completions", content=body, headers={**headers, "content-encoding": "br"})
    assert (answer.status_code, "br" in answer.json()["error"]["message"]) == (415, True)


def test_unknown_fields_are_left_out_and_told(service: Service) -> None:
    body = {"prompt": "x", "max_tokens": 24, "temperature": 0, "nonsense": {"a": 1}, "other_nonsense": None}
    for stream in (False, True):
        answer = service.client.post("/v1/completions", json={**body, "stream": stream})
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-pdctl-ignored-fields"] == "nonsense, other_nonsense"
    answer = service.client.post("/tokenize", json={"prompt": "abc", "nonsense": 1})
    assert (answer.json()["count"], answer.headers["x-pdctl-ignored-fields"]) == (3, "nonsense")
    assert 'pdctl_proxy_ignored_fields_total{field="nonsense"} 3.0' in service.client.get("/metrics").text
    assert "x-pdctl-ignored-fields" not in service.client.post("/v1/completions", json={"prompt": "x"}).headers


def test_unknown_fields_are_refused_where_the_topology_says_so(service: Service) -> None:
    path = service.run.folder / "pdctl.toml"
    before = path.read_text()
    service.run.write(before.replace("[proxy]", '[proxy]\nunknown_fields = "refuse"'))
    try:
        service.run.cli("apply", check=True)
        for path_, body in (("/v1/completions", {"prompt": "x"}), ("/tokenize", {"prompt": "x"})):
            answer = service.client.post(path_, json={**body, "nonsense": 1})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "nonsense")
    finally:
        service.run.write(before)
        service.run.cli("apply", check=True)


def test_ids_that_the_tokenizer_lacks_are_refused(service: Service) -> None:
    for token in (10**6, 2**31 - 1):
        answer = service.client.post("/detokenize", json={"tokens": [token]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tokens")


def test_the_version_is_told(service: Service) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", service.client.get("/version").json()["version"])
