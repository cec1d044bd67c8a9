"""Fields of OpenAI's and vLLM's API, through a prefill and a decode engine: streamed, whole, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.service import Run, Service, events, running, topology

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

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
    seen = {both(service, **fields, temperature=2.0, seed=seed) for seed in range(8)}
    assert {text for text, _ in seen} <= set(CHOICES)
    assert len(seen) > 1
    assert {reason for _, reason in seen} == {"stop"}


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
     ({"nonsense": 1}, "nonsense")],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_by_name(service: Service, fields: dict[str, Any], param: str) -> None:
    answer = service.client.post("/v1/completions", json={"prompt": "x", **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_the_version_is_told(service: Service) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", service.client.get("/version").json()["version"])
