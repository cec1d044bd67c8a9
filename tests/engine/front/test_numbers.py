"""Numbers in JSON: whole floats count as whole numbers, and invalid ones are refused with the field's name."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from pdctl.engine.front.api import openai
from pdctl.net.openai.api import ApiError
from pdctl.proxy.client import requests

WHOLE = ("max_tokens", "seed", "top_k", "n", "min_tokens", "priority", "logprobs", "prompt_logprobs")
BOUNDED = ("max_tokens", "seed", "n", "top_k", "min_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens",
           "priority")  # fmt: skip


def body(name: str, number: str) -> bytes:
    return f'{{"prompt": "x", "{name}": {number}}}'.encode()


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("number", ["1.0", "1e0", "10e-1", "1.000"])
def test_whole_floats_are_whole_numbers(name: str, number: str) -> None:
    assert getattr(openai.parse_body(body(name, number), chat=False), name) == 1
    requests.parse(body(name, number), "/v1/completions", False, "r", "m")


def test_several_at_once_and_nested_values_stay() -> None:
    raw = b'{"prompt": "x", "max_tokens": 3.0, "seed": 4.0, "stop": ["5.0"], "logit_bias": {"7": 1.5}}'
    found = openai.parse_body(raw, chat=False)
    assert (found.max_tokens, found.seed, found.stop, found.logit_bias) == (3, 4, ["5.0"], {"7": 1.5})


@pytest.mark.parametrize("name", ["prompt", "stop_token_ids", "allowed_token_ids"])
def test_whole_floats_in_lists_are_whole_numbers(name: str) -> None:
    raw = f'{{"prompt": "x", "{name}": [5.0, 6, 7e0]}}'.encode()
    assert getattr(openai.parse_body(raw, chat=False), name) == [5, 6, 7]
    with pytest.raises(ApiError):
        openai.parse_body(raw.replace(b"5.0", b"5.5"), chat=False)


@pytest.mark.parametrize(("last", "seed"), [("null", None), ("7", 7), ("7.0", 7)])
def test_of_a_name_that_comes_twice_the_last_one_counts(last: str, seed: int | None) -> None:
    raw = f'{{"prompt": "x", "seed": 5.0, "seed": {last}}}'.encode()
    assert openai.parse_body(raw, chat=False).seed == seed
    requests.parse(raw, "/v1/completions", False, "r", "m")


@pytest.mark.parametrize("last", ['"x"', "1.5", "[]", "{}", "[1.5]", "1e999"])
def test_of_a_name_that_comes_twice_a_bad_last_one_is_refused(last: str) -> None:
    raw = f'{{"prompt": "x", "seed": 5.0, "seed": {last}}}'.encode()
    for read in (
        lambda: openai.parse_body(raw, chat=False),
        lambda: requests.parse(raw, "/v1/completions", False, "r", "m"),
    ):
        with pytest.raises(ApiError):
            read()


@pytest.mark.parametrize("rest", ['"\\ud800"', "%", "[" * 5000, '"\xff"', "01", "tru"])
def test_what_follows_a_number_that_is_rewritten_is_read_as_well(rest: str) -> None:
    raw = f'{{"prompt": "x", "seed": 5.0, "user": {rest}'.encode("latin-1")
    for read in (
        lambda: openai.parse_body(raw, chat=False),
        lambda: requests.parse(raw, "/v1/completions", False, "r", "m"),
    ):
        with pytest.raises(ApiError) as found:
            read()
        assert found.value.status == 400


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("number", ["1.5", "1e300", '"5"', "9" * 23, "9" * 309, "9" * 5000, "-" + "9" * 30, "true"])
def test_what_is_no_such_number_is_refused_by_name(name: str, number: str) -> None:
    readers: list[Callable[[bytes], object]] = [lambda raw: openai.parse_body(raw, chat=False)]
    if name in ("max_tokens", "seed", "n"):
        readers.append(lambda raw: requests.parse(raw, "/v1/completions", False, "r", "m"))
    for read in readers:
        with pytest.raises(ApiError) as found:
            read(body(name, number))
        error = json.loads(found.value.body())["error"]
        assert (found.value.status, error["param"], error["code"]) == (400, name, 400)
        assert len(error["message"]) < 200
        assert "at least 1;" not in error["message"]
