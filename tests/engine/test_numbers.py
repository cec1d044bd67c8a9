"""Numbers as JSON writers write them: whole floats are whole numbers, and what is none is refused by name."""

from __future__ import annotations

import json

import pytest

from pdctl.engine.front import openai
from pdctl.openai_api import ApiError
from pdctl.proxy import requests

WHOLE = ("max_tokens", "seed", "top_k", "n", "min_tokens", "priority", "logprobs")


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


@pytest.mark.parametrize("name", ["max_tokens", "seed", "n"])
@pytest.mark.parametrize("number", ["1.5", "1e300", '"5"', "9" * 23, "9" * 309, "9" * 5000, "-" + "9" * 30, "true"])
def test_what_is_no_such_number_is_refused_by_name(name: str, number: str) -> None:
    for read in (
        lambda raw: openai.parse_body(raw, chat=False),
        lambda raw: requests.parse(raw, "/v1/completions", False, "r", "m"),
    ):
        with pytest.raises(ApiError) as found:
            read(body(name, number))
        error = json.loads(found.value.body())["error"]
        assert (found.value.status, error["param"], error["code"]) == (400, name, 400)
        assert len(error["message"]) < 200
        assert "at least 1;" not in error["message"]
