"""Bodies and answers of LMDeploy, beyond the contract of every kind."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pdctl.adapters import UNKNOWN_TOKEN, EngineError, dialect
from pdctl.net.openai.api import Counts
from tests.adapters.lmdeploy.messages import ATTEMPT, HELD, state

SPEAKS = dialect("lmdeploy")


def body(call: Any) -> dict[str, Any]:
    return dict(msgspec.json.decode(call.body))


def prefilled(reason: str = "length", **more: object) -> bytes:
    choice = {"index": 0, "text": "x", "logprobs": None, "finish_reason": reason}
    usage = {"prompt_tokens": 9, "total_tokens": 10, "completion_tokens": 1}
    fields = {"id": "12", "choices": [choice], "usage": usage, "cache_block_ids": [4, 5], "remote_token_ids": [77]}
    return msgspec.json.encode({**fields, **more})


def test_prefill_keeps_the_kv_of_one_token() -> None:
    call = SPEAKS.prefill_call(state(max_tokens=50, max_completion_tokens=60, session_id=3), ATTEMPT)
    found = body(call)
    assert found == {
        "model": "m", "prompt": "hi", "max_tokens": 1, "max_completion_tokens": 1, "stream": False, "with_cache": True,
        "preserve_cache": True,
    }  # fmt: skip
    assert call.headers.startswith(b"x-lmdeploy-distserve-proxy: ")


def test_decode_gets_what_prefill_keeps() -> None:
    found = body(SPEAKS.decode_call(state(), ATTEMPT, HELD, stream=False))
    assert found["migration_request"] == {
        "protocol": 2, "remote_engine_id": "http://10.0.0.1:1", "remote_session_id": 7, "remote_token_id": 5,
        "remote_block_ids": [1, 2], "is_dummy_prefill": False,
    }  # fmt: skip
    assert "with_cache" not in found
    assert found["max_tokens"] == 16, "OpenAI's default, not what is left of the context"
    assert "max_tokens" not in body(SPEAKS.decode_call(state(chat=True), ATTEMPT, None, stream=False))
    assert body(SPEAKS.decode_call(state(chat=True, min_tokens=3), ATTEMPT, None, stream=False))["min_new_tokens"] == 3


@pytest.mark.parametrize(
    ("more", "session"),
    [
        ({"id": "12"}, 12),
        ({"id": "-1"}, None),
        ({"id": "chatcmpl-3fY"}, None),
        ({"id": "chatcmpl-3fY", "cache_session_id": 5}, 5),
        ({"id": "12", "cache_session_id": 0}, 0),
        ({"id": "12", "cache_session_id": -1}, None),
        ({"id": "\u0661\u0662"}, None),
        ({"id": ""}, None),
    ],
)  # fmt: skip
def test_the_session_that_holds_the_kv(more: dict[str, Any], session: int | None) -> None:
    done = SPEAKS.parse_prefill(prefilled(**more), state())
    assert (done.token_ids, done.finish_reason, done.prompt_tokens) == ([], None, 9)
    assert done.hand_over is not None
    moved = body(SPEAKS.decode_call(state(), ATTEMPT, done.hand_over, stream=False))["migration_request"]
    assert moved["remote_session_id"] == (-1 if session is None else session)
    assert (moved["remote_token_id"], moved["remote_block_ids"]) == (77, [4, 5])
    release = SPEAKS.release_call(done.hand_over)
    if session is None:
        assert release is None
    else:
        assert release is not None
        assert release.path == "/distserve/free_cache"
        assert body(release)["remote_session_id"] == session


def test_an_answer_that_ends_at_prefill_leaves_kv_to_free() -> None:
    done = SPEAKS.parse_prefill(prefilled("stop"), state())
    assert (done.finish_reason, done.hand_over) == ("stop", None)
    assert done.left is not None
    assert SPEAKS.release_call(done.left) is not None
    assert SPEAKS.parse_prefill(prefilled("stop", cache_block_ids=None), state()).left is None


@pytest.mark.parametrize(
    "answer",
    [
        prefilled("abort"), prefilled("error"), b'{"error_code":10402,"text":"Failed to get response"}',
        b'{"message":"x","type":"t","code":400,"param":null,"object":"error"}', b'{"error":{"message":"x"}}',
    ],
)  # fmt: skip
def test_an_error_is_an_error_also_with_status_200(answer: bytes) -> None:
    for parse in (
        lambda: SPEAKS.parse_prefill(answer, state()),
        lambda: SPEAKS.parse_event(answer, state()),
        lambda: SPEAKS.parse_whole(answer),
    ):
        with pytest.raises(EngineError) as raised:
            parse()
        assert raised.value.status >= 400


def test_an_answer_without_kv_is_no_prefill() -> None:
    for answer in (prefilled(cache_block_ids=None), prefilled(remote_token_ids=[]), prefilled(choices=[])):
        with pytest.raises(EngineError):
            SPEAKS.parse_prefill(answer, state())


def test_an_engines_flat_error_keeps_its_words() -> None:
    flat = b'{"message":"too long","type":"invalid_request_error","code":400,"param":"prompt","object":"error"}'
    found = SPEAKS.parse_error(400, flat)
    assert (found.status, found.message, found.kind, found.param) == (
        400, "too long", "invalid_request_error", "prompt",
    )  # fmt: skip
    assert SPEAKS.parse_error(401, flat).status == 502, "it is not the client's key"
    assert SPEAKS.parse_error(500, b"Internal Server Error").kv_lost, "the first token may have ended the answer"
    assert not SPEAKS.parse_error(503, flat).kv_lost


def test_events_without_token_ids_count_by_their_text() -> None:
    event = b'{"choices": [{"index": 0, "text": "ab"}], "usage": null}'
    found = SPEAKS.parse_event(event, state())
    assert found.token_ids == [UNKNOWN_TOKEN]
    assert found.choice is not None
    assert bytes(found.choice["finish_reason"]) == b"null"
    chat = b'{"choices":[{"index":0,"delta":{"content":"ab"},"output_ids":[3,4]}]}'
    assert SPEAKS.parse_event(chat, state(chat=True)).token_ids == [3, 4]
    last = b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}'
    assert SPEAKS.parse_event(last, state()).usage == Counts(3, 2)


def test_only_prefill_engines_need_others() -> None:
    assert SPEAKS.pairing.alone == {"decode", "hybrid"}
    assert not SPEAKS.pairing.hybrids_pair
    assert SPEAKS.pairing.room is not None
    sizes = {"tp_size": 1, "ep_size": 1, "dp_size": 1, "pp_size": None, "dp_rank": 0, "num_cpu_blocks": 0}
    info = msgspec.json.encode(msgspec.json.encode({**sizes, "block_size": 64, "num_gpu_blocks": 10}).decode())
    assert SPEAKS.pairing.room.tokens(info) == 640
    assert SPEAKS.pairing.room.tokens(b"{}") is None
