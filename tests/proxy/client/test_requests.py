from __future__ import annotations

import json

import msgspec
import pytest

from pdctl.net.openai.api import ApiError
from pdctl.proxy.client.requests import ClientRequest, parse
from pdctl.proxy.client.unknown_fields import UnknownFields, header


def parsed(chat: bool = False, **fields: object) -> ClientRequest:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    return parse(json.dumps(fields).encode(), path, chat, "id", "m")


KNOWN = frozenset({"prompt", "stream", "stream_options", "seed"})


def test_what_no_engine_knows_is_left_out_or_refused() -> None:
    body = b'{"prompt": "x", "nonsense": 1, "stream": true, "stream_options": {"odd": 1, "include_usage": true}}'

    def asked(refuse: bool, known: frozenset[str] | None = KNOWN) -> ClientRequest:
        return parse(body, "/v1/completions", False, "id", "m", UnknownFields(refuse), known)

    found = asked(refuse=False)
    assert found.ignored == ["nonsense", "stream_options.odd"]
    assert (set(found.legs[0]), found.include_usage) == ({"prompt", "seed"}, True)
    assert header(found.ignored) == (b"x-pdctl-ignored-fields", b"nonsense, stream_options.odd")
    assert "nonsense" in asked(refuse=False, known=None).legs[0], "an engine that does not say what it knows"
    with pytest.raises(ApiError) as refused:
        asked(refuse=True)
    assert (refused.value.status, refused.value.param) == (400, "nonsense")
    with pytest.raises(ApiError) as refused:
        asked(refuse=True, known=None)
    assert refused.value.param == "odd"


def test_names_that_clients_make_up_are_bounded() -> None:
    unknown = UnknownFields()
    names = [f"field{number}" for number in range(1000)] + ['x"\n', "y" * 99]
    labels = {unknown.label(name) for name in names}
    assert len(labels) == 65
    assert "other" in labels
    assert len(unknown.labels(names * 100)) == 64
    _, told = header(["a\r\nb: c"] + [f"f{number}" for number in range(100)])
    assert told.endswith(b", and 85 more")
    assert len(told) < 200
    assert b"\n" not in told


def decoded(leg: dict[str, object]) -> dict[str, object]:
    return dict(json.loads(msgspec.json.encode(leg)))


def test_one_prompt_is_one_leg_with_a_seed_of_its_own() -> None:
    request = parsed(prompt="x", stream=True, stream_options={"include_usage": True}, top_k=3)
    (leg,) = request.legs
    assert request.stream
    assert request.include_usage
    assert set(leg) == {"prompt", "seed", "top_k"}
    assert parsed(prompt="x").legs != parsed(prompt="x").legs, "two requests draw differently"


def test_a_clients_seed_stays() -> None:
    assert decoded(parsed(prompt="x", seed=7).legs[0])["seed"] == 7


def test_prompts_and_n_are_split_in_openais_order() -> None:
    request = parsed(prompt=["a", "b"], n=2, seed=5)
    legs = [decoded(leg) for leg in request.legs]
    assert [(leg["prompt"], leg["seed"]) for leg in legs] == [("a", 5), ("a", 6), ("b", 7), ("b", 8)]
    assert all("n" not in leg for leg in legs)
    assert [decoded(leg)["prompt"] for leg in parsed(prompt=[[1, 2], [3]]).legs] == [[1, 2], [3]]
    assert decoded(parsed(prompt=[1, 2, 3]).legs[0])["prompt"] == [1, 2, 3], "token ids are one prompt"
    assert len(parsed(chat=True, messages=[], n=3).legs) == 3


def test_output_limits_are_those_of_openai() -> None:
    assert parsed(prompt="x").max_tokens == 16
    assert parsed(chat=True, messages=[]).max_tokens is None
    assert parsed(chat=True, messages=[], max_completion_tokens=5, max_tokens=9).max_tokens == 5


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"prompt": [["AAA"]]}, 400, "prompt"),
        ({"prompt": [[[1]]]}, 400, "prompt"),
        ({"prompt": ["x", 5]}, 400, "prompt"),
        ({"prompt": [[1], {}]}, 400, "prompt"),
        ({"prompt": "x", "n": 0}, 400, "n"),
        ({"prompt": "x", "n": "2"}, 400, "n"),
        ({"prompt": ["x"] * 100, "n": 2}, 400, "prompt"),
        ({"prompt": "x", "model": "other"}, 404, "model"),
        ({"prompt": "x", "kv_transfer_params": None}, 400, "kv_transfer_params"),
        ({"prompt": "x", "resume_token_ids": [1]}, 400, "resume_token_ids"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"prompt": "x", "best_of": 3}, 400, "best_of"),
        ({"prompt": "x", "stream": True, "prompt_logprobs": 0}, 400, "prompt_logprobs"),
        ({"prompt": "x", "priority": "high"}, 400, "priority"),
    ],
)
def test_what_no_engine_needs_to_be_asked(fields: dict[str, object], status: int, param: str) -> None:
    with pytest.raises(ApiError) as found:
        parsed(False, **fields)
    assert (found.value.status, found.value.param) == (status, param)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff\xfe", b'{"prompt": "\xff"}', b"[" * 5000, b'{"a":' * 2000])
def test_bodies_that_are_no_requests(body: bytes) -> None:
    with pytest.raises(ApiError) as found:
        parse(body, "/v1/completions", False, "id", "m")
    assert found.value.status == 400
