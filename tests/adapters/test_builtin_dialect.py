"""The requests that the proxy sends to builtin engines, and how it parses their answers."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.adapters import Attempt, Call, Choice, Condition, EngineError, RequestState, dialect
from pdctl.net.openai.api import Counts
from pdctl.net.openai.fields import KNOWN_FIELDS
from pdctl.proxy_wire import EngineAddress

BUILTIN = dialect("builtin")
PREFILL = EngineAddress("p0", "prefill", "builtin", "10.0.0.1", 7001)
DECODE = EngineAddress("d0", "decode", "builtin", "10.0.0.2", 7002)
PAIR, ALONE = Attempt("a1", PREFILL, DECODE), Attempt("a2", PREFILL, PREFILL)
LEASE = {"lease_id": "pe.1", "epoch": "pe", "remote_host": "10.0.0.1", "extra": [1, 2]}


def state(emitted: list[int] | None = None, chat: bool = False, counts_each: bool = False) -> RequestState:
    fields = {"prompt": "hello", "max_tokens": 9, "seed": 3}
    raw: dict[str, object] = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in fields.items()}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    return RequestState(path, chat, raw, emitted or [], counts_each=counts_each)


def body(call: Call | None) -> dict[str, object]:
    assert call is not None
    return msgspec.json.decode(call.body, type=dict[str, object])


def plain(choice: Choice | None) -> dict[str, object]:
    assert choice is not None
    return msgspec.json.decode(msgspec.json.encode(choice), type=dict[str, object])


def answer(choice: dict[str, object] | None, **more: object) -> bytes:
    return msgspec.json.encode({"choices": [] if choice is None else [choice], **more})


class TestCalls:
    def test_prefill_is_asked_to_hold_the_kv_and_for_one_answer(self) -> None:
        call = BUILTIN.prefill_call(state(), PAIR)
        assert call.path == "/v1/completions"
        assert body(call) == {
            "prompt": "hello", "max_tokens": 9, "seed": 3, "stream": False, "return_token_ids": True,
            "kv_transfer_params": {"do_remote_decode": True, "offer_to": {"host": "10.0.0.2", "port": 7002}},
        }  # fmt: skip

    def test_chunks_are_offered_to_engines_of_this_kind_alone(self) -> None:
        other = EngineAddress("d1", "decode", "vllm", "10.0.0.3", 7003)
        params = body(BUILTIN.prefill_call(state(), Attempt("a", PREFILL, other)))["kv_transfer_params"]
        assert params == {"do_remote_decode": True}

    def test_decode_gets_the_hand_over_as_it_came(self) -> None:
        given = b'{"lease_id" : "pe.1", "big":12345678901234567890,  "f":1.10}'
        call = BUILTIN.decode_call(state(), PAIR, given, stream=True)
        assert b'"kv_transfer_params":' + given in call.body
        assert "kv_transfer_params" not in body(BUILTIN.decode_call(state(), ALONE, None, stream=True))

    @pytest.mark.parametrize("counts_each", [False, True])
    def test_only_streams_are_asked_for_token_ids_and_counts(self, counts_each: bool) -> None:
        found = body(BUILTIN.decode_call(state(counts_each=counts_each), PAIR, None, stream=True))
        assert (found["stream"], found["return_token_ids"]) == (True, True)
        more = {"continuous_usage_stats": True} if counts_each else {}
        assert found["stream_options"] == {"include_usage": True, **more}
        whole = body(BUILTIN.decode_call(state(counts_each=counts_each), PAIR, None, stream=False))
        assert whole == {"prompt": "hello", "max_tokens": 9, "seed": 3, "stream": False}

    @given(st.lists(st.integers(0, 2**31), max_size=20), st.booleans())
    def test_a_request_goes_on_after_the_tokens_its_client_has(self, emitted: list[int], chat: bool) -> None:
        asked = state(emitted, chat)
        assert BUILTIN.cannot_resume(asked) == ""
        assert BUILTIN.ending(asked) is None
        for call in (BUILTIN.prefill_call(asked, PAIR), BUILTIN.decode_call(asked, PAIR, b"{}", stream=True)):
            found = body(call)
            assert call.path == asked.path
            assert found.get("resume_token_ids", []) == emitted
            assert ("resume_token_ids" in found) == bool(emitted)
            assert found["max_tokens"] == 9, "limits count tokens from the first on"

    def test_what_a_prefill_left_is_released_by_lease_or_by_attempt(self) -> None:
        release = BUILTIN.release_call(msgspec.json.encode(LEASE))
        assert body(release) == {"lease_id": "pe.1", "epoch": "pe", "holder": "proxy"}
        assert release is not None
        assert release.path == "/pdctl/v1/leases/release"
        give_up = BUILTIN.give_up_call("a1")
        assert body(give_up) == {"attempt": "a1"}
        assert give_up is not None
        assert give_up.path == "/pdctl/v1/attempts/release"

    @pytest.mark.parametrize("held", [b"{}", b"[1]", b'"x"', b'{"lease_id":1,"epoch":"e"}', b"\xff"])
    def test_what_names_no_lease_is_left_to_time(self, held: bytes) -> None:
        assert BUILTIN.release_call(held) is None

    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
    def test_the_fields_it_takes_are_those_its_engine_decodes(self, path: str) -> None:
        assert BUILTIN.known_fields(path) == KNOWN_FIELDS[path]


class TestPrefilled:
    def test_held_kv_is_handed_on_and_the_answer_goes_on(self) -> None:
        choice = {"index": 0, "text": "h", "token_ids": [5], "finish_reason": "length", "logprobs": None}
        found = BUILTIN.parse_prefill(
            answer(choice, usage={"prompt_tokens": 4, "completion_tokens": 1}, kv_transfer_params=LEASE), state()
        )
        assert (found.token_ids, found.prompt_tokens, found.finish_reason) == ([5], 4, None)
        assert plain(found.choice) == {"text": "h", "logprobs": None, "finish_reason": None}
        assert found.hand_over is not None
        assert msgspec.json.decode(found.hand_over) == LEASE

    @pytest.mark.parametrize("more", [{}, {"kv_transfer_params": None}])
    def test_an_answer_that_ends_at_prefill_has_no_hand_over(self, more: dict[str, object]) -> None:
        choice = {"index": 0, "text": "h", "token_ids": [5, 6], "finish_reason": "stop"}
        found = BUILTIN.parse_prefill(answer(choice, **more), state())
        assert (found.token_ids, found.prompt_tokens, found.finish_reason, found.hand_over) == ([5, 6], 0, "stop", None)
        assert plain(found.choice) == {"text": "h", "finish_reason": "stop"}

    def test_a_chats_message_becomes_the_streams_delta(self) -> None:
        message = {"role": "assistant", "content": "h"}
        choice = {"index": 0, "message": message, "token_ids": [5], "finish_reason": "stop"}
        found = BUILTIN.parse_prefill(answer(choice, kv_transfer_params=LEASE), state(chat=True))
        assert plain(found.choice) == {"delta": message, "finish_reason": None}

    def test_an_answer_without_choices_is_the_engines_failure(self) -> None:
        with pytest.raises(EngineError, match="without choices") as failure:
            BUILTIN.parse_prefill(answer(None), state())
        assert (failure.value.status, failure.value.kind) == (502, "bad_upstream")


class TestEvents:
    def test_an_event_has_its_tokens_its_end_and_its_counts(self) -> None:
        choice = {"index": 3, "text": "h", "token_ids": [5, 6], "finish_reason": "length"}
        found = BUILTIN.parse_event(answer(choice, usage={"prompt_tokens": 4, "completion_tokens": 2}), state())
        assert (found.token_ids, found.finish_reason, found.usage) == ([5, 6], "length", Counts(4, 2))
        assert plain(found.choice) == {"text": "h", "finish_reason": "length"}
        assert found.prompt_ids is None

    def test_the_counts_at_the_end_are_no_choice(self) -> None:
        found = BUILTIN.parse_event(answer(None, usage={"prompt_tokens": 4, "completion_tokens": 2}), state())
        assert (found.token_ids, found.choice, found.finish_reason, found.usage) == ([], None, None, Counts(4, 2))

    def test_an_error_in_mid_stream_is_a_failure_that_says_whether_kv_was_lost(self) -> None:
        for kind, lost in (("kv_lost", True), ("server_error", False)):
            data = msgspec.json.encode({"error": {"message": "no", "type": kind}})
            with pytest.raises(EngineError, match="no") as failure:
                BUILTIN.parse_event(data, state())
            assert (failure.value.status, failure.value.kv_lost) == (500, lost)
            assert BUILTIN.parse_error(409, data).kv_lost == lost

    def test_its_events_go_to_clients_as_they_are(self) -> None:
        assert BUILTIN.client_ready(state([1, 2]))

    def test_an_answer_in_one_piece_is_counted_and_not_changed(self) -> None:
        whole = answer({"index": 0, "text": "h"}, usage={"prompt_tokens": 4, "completion_tokens": 2})
        assert BUILTIN.parse_whole(whole) == Counts(4, 2)
        for bad in (answer({"index": 0}), answer(None, usage={"prompt_tokens": 4, "completion_tokens": 2})):
            with pytest.raises(EngineError, match="choices or usage"):
                BUILTIN.parse_whole(bad)


LINKS = [{"peer": "p0", "error": ""}, {"peer": "p1", "error": "nobody there"}, {"peer": "p2"}]
STATE = {"block_size": 16, "blocks_total": 9, "blocks_free": 4, "max_num_seqs": 8, "links": LINKS}


@pytest.mark.parametrize(
    ("status", "said", "condition"),
    [
        (200, STATE, Condition(True, 8, 64, frozenset({"p1"}))),
        (503, STATE, Condition(False, 8, 64, frozenset({"p1"}))),
        (200, {**STATE, "blocks_total": 0}, Condition(False, 8, 64, frozenset({"p1"}))),  # its model is loading
        (200, {**STATE, "max_num_seqs": 0, "links": []}, Condition(True, None, 64)),
        (200, {**STATE, "blocks_free": 0, "links": []}, Condition(True, 8, 0)),
        (200, {}, Condition(False, None, 0)),
        (200, [], Condition(False)),
        (200, {"links": [{"error": "x"}]}, Condition(False)),
    ],
)
def test_the_probe_tells_seats_room_and_lost_peers(status: int, said: object, condition: Condition) -> None:
    assert BUILTIN.parse_condition(status, msgspec.json.encode(said)) == condition


@pytest.mark.parametrize("garbage", [b"", b"{", b"\xff\xfe"])
def test_a_probe_that_is_no_state_is_no_engine(garbage: bytes) -> None:
    assert BUILTIN.parse_condition(200, garbage) == Condition(usable=False)
