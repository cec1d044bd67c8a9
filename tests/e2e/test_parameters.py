"""Every parameter of the official client: good values are answered, bad ones get 400 with the parameter's name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.resources.chat.completions import Completions as Chats
from openai.resources.completions import Completions

from tests.clients.parameters import CHAT, TEXT, cases, of_client
from tests.service import Run, Service, running, single

pytestmark = pytest.mark.e2e

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    with running(module_run, single(model="sample:tiny-chat")) as found:
        yield found
        found.idle()


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="x", max_retries=0) as found:
        yield found


def test_the_tables_have_every_parameter_of_the_installed_client() -> None:
    assert of_client(Chats) == set(CHAT)
    assert of_client(Completions) == set(TEXT)


def ask(client: openai.OpenAI, chat: bool, fields: dict[str, Any]) -> None:
    """Send a request and read its answer to the end. The client's own checks of types do not run."""
    given: dict[str, Any] = {"model": "m", "max_tokens": 3, **({"messages": HELLO} if chat else {"prompt": "x"})}
    if "max_completion_tokens" in fields:
        del given["max_tokens"]
    raw = (client.chat.completions if chat else client.completions).with_raw_response.create(**{**given, **fields})
    assert raw.headers.get("x-pdctl-ignored-fields") is None, "nothing is ignored"
    answer = raw.parse()
    if fields.get("stream"):
        assert any(chunk.choices for chunk in answer)
    else:
        assert answer.choices


@pytest.mark.parametrize(("name", "fields"), cases(CHAT, good=True), ids=str)
def test_good_values_of_a_chat(client: openai.OpenAI, name: str, fields: dict[str, Any]) -> None:
    ask(client, True, fields)


@pytest.mark.parametrize(("name", "fields"), cases(TEXT, good=True), ids=str)
def test_good_values_of_a_completion(client: openai.OpenAI, name: str, fields: dict[str, Any]) -> None:
    ask(client, False, fields)


def refused(client: openai.OpenAI, chat: bool, name: str, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as found:
        ask(client, chat, fields)
    assert found.value.param == name, found.value.message


@pytest.mark.parametrize(("name", "fields"), cases(CHAT, good=False), ids=str)
def test_bad_values_of_a_chat(client: openai.OpenAI, name: str, fields: dict[str, Any]) -> None:
    refused(client, True, name, fields)


@pytest.mark.parametrize(("name", "fields"), cases(TEXT, good=False), ids=str)
def test_bad_values_of_a_completion(client: openai.OpenAI, name: str, fields: dict[str, Any]) -> None:
    refused(client, False, name, fields)


def test_best_of_may_be_n(client: openai.OpenAI) -> None:
    """All of the best n are returned, so this is the same request without it."""
    found = client.completions.create(model="m", prompt="x", max_tokens=3, n=2, best_of=2)
    assert len(found.choices) == 2
