from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.adapters import Attempt, CannotResume, EngineError, RequestState, Retelling, dialect
from pdctl.adapters.sglang.dialect import room_of
from pdctl.net.asgi import new_name
from pdctl.proxy_wire import EngineAddress

PREFILL = EngineAddress("p0", "prefill", "sglang", "10.0.0.1", 1, ports={"bootstrap": 9001})
DECODE = EngineAddress("d0", "decode", "sglang", "10.0.0.2", 2)
PAIR = Attempt("a1", PREFILL, DECODE)
SPEAKS = dialect("sglang")


def state(emitted: list[int] | None = None, chat: bool = False, held: int = 0, **fields: Any) -> RequestState:
    raw: dict[str, object] = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in fields.items()}
    return RequestState("/v1/chat/completions" if chat else "/v1/completions", chat, raw, emitted or [], [7, 8], held)


def decode_body(found: RequestState, attempt: Attempt = PAIR, stream: bool = True) -> dict[str, object]:
    call = SPEAKS.decode_call(found, attempt, None, stream)
    assert call.path == found.path
    body: dict[str, object] = msgspec.json.decode(call.body)
    return body


class TestMeeting:
    def test_both_engines_get_the_same_room_and_their_own_end(self) -> None:
        asked = state(prompt="x", max_tokens=4)
        prefill = msgspec.json.decode(SPEAKS.prefill_call(asked, PAIR).body)
        decode = decode_body(asked)
        for name, value in (
            ("bootstrap_host", "10.0.0.1"),
            ("bootstrap_port", 9001),
            ("bootstrap_room", room_of("a1")),
        ):
            assert prefill[name] == decode[name] == value
        assert prefill["rid"] == decode["rid"] == "a1"
        for call in (SPEAKS.give_up_call("a1"), SPEAKS.give_up_decode_call("a1")):
            assert call is not None
            assert (call.path, msgspec.json.decode(call.body)) == ("/abort_request", {"rid": "a1", "abort_all": False})

    def test_an_attached_prefill_has_sglangs_own_port(self) -> None:
        body = decode_body(state(prompt="x"), Attempt("a1", EngineAddress("p", "prefill", "sglang", "h", 1), DECODE))
        assert body["bootstrap_port"] == 8998

    def test_rooms_are_63_bits_unique_and_never_0(self) -> None:
        rooms = {room_of(new_name()) for _ in range(2000)}
        assert len(rooms) == 2000
        assert all(0 < room < 2**63 for room in rooms)

    def test_one_engine_alone_meets_nobody(self) -> None:
        alone = EngineAddress("h", "hybrid", "sglang", "h", 1)
        body = decode_body(state(prompt="x"), Attempt("a1", alone, alone))
        assert not [name for name in body if name.startswith("bootstrap")]

    def test_a_clients_own_rooms_and_ranks_do_not_pass(self) -> None:
        asked = state(prompt="x", rid="mine", bootstrap_room=1, data_parallel_rank=3, routed_dp_rank=1)
        body = decode_body(asked)
        assert body["rid"] == "a1"
        assert body["bootstrap_room"] == room_of("a1")
        assert {"data_parallel_rank", "routed_dp_rank"}.isdisjoint(body)


class TestContinuing:
    def test_goes_on_from_tokens_with_what_is_left(self) -> None:
        body = decode_body(state([1, 2, 3], prompt="x", max_tokens=10, min_tokens=2, temperature=0, lora_path="a"))
        assert body["prompt"] == [7, 8, 1, 2, 3]
        assert (body["max_tokens"], body["min_tokens"], body["temperature"]) == (7, 0, 0)
        assert body["lora_path"] == "a", "other fields of the request stay"
        assert decode_body(state([1], prompt="x"))["max_tokens"] == 15, "the default is the first request's"

    def test_completions_obey_max_completion_tokens(self) -> None:
        body = decode_body(state(prompt="x", max_completion_tokens=40))
        assert body["max_tokens"] == 40
        assert "max_completion_tokens" not in body
        assert decode_body(state([1], prompt="x", max_completion_tokens=40))["max_tokens"] == 39

    @pytest.mark.parametrize(
        "field",
        [{"stop": "END"}, {"presence_penalty": 0.5}, {"repetition_penalty": 1.1}, {"echo": True}, {"logprobs": 0},
         {"response_format": {"type": "json_object"}}, {"regex": "a+"}, {"stop_regex": "a"}, {"session_id": "s"}],
    )  # fmt: skip
    def test_what_would_not_be_the_same_is_refused(self, field: dict[str, Any]) -> None:
        assert next(iter(field)) in SPEAKS.cannot_resume(state([1], prompt="x", **field))

    @pytest.mark.parametrize(
        "field", [{"stop": []}, {"presence_penalty": 0}, {"repetition_penalty": 1}, {"echo": False}]
    )
    def test_fields_that_say_nothing_do_not_matter(self, field: dict[str, Any]) -> None:
        assert not SPEAKS.cannot_resume(state([1], prompt="x", **field))

    def test_an_engine_that_told_no_prompt_ids_cannot(self) -> None:
        asked = state([1], prompt="x")
        asked.prompt_ids = []
        assert "token ids" in SPEAKS.cannot_resume(asked)

    def test_only_the_end_was_lost(self) -> None:
        found = SPEAKS.ending(state([1, 2], prompt="x", max_tokens=2))
        assert found is not None
        assert bytes(found["finish_reason"]) == b'"length"'
        assert SPEAKS.ending(state([1], prompt="x", max_tokens=2)) is None
        assert SPEAKS.ending(state([], chat=True, max_tokens=0)) is None

    @pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 0.0, "stop": "x"}, {"top_k": 1}])
    def test_greedy_chats_are_repeated(self, fields: dict[str, Any]) -> None:
        assert not SPEAKS.cannot_resume(state(chat=True, **fields))

    @pytest.mark.parametrize("fields", [{}, {"temperature": 0.7}, {"temperature": 0, "tools": [{}]}])
    def test_other_chats_are_not(self, fields: dict[str, Any]) -> None:
        assert SPEAKS.cannot_resume(state(chat=True, **fields))


def events_of(asked: RequestState, *deltas: Mapping[str, object], reason: str | None = None) -> list[str]:
    """The new text of each event; "-" for one that the client does not get."""
    found = []
    for number, delta in enumerate(deltas):
        ends = reason if number == len(deltas) - 1 else None
        choice = {"index": 0, "delta": delta, "finish_reason": ends}
        event = SPEAKS.parse_event(msgspec.json.encode({"choices": [choice]}), asked)
        if event.choice is None:
            found.append("-")
        else:
            shown = msgspec.json.decode(event.choice["delta"])
            found.append((shown.get("reasoning_content") or "") + "/" + (shown.get("content") or ""))
    return found


class TestChats:
    def test_a_repeated_chat_gives_the_client_only_what_is_new(self) -> None:
        asked = state(chat=True, temperature=0)
        first = [
            {"role": "assistant", "content": ""},
            {"reasoning_content": "hm"},
            {"content": "ab"},
            {"content": "cd"},
        ]
        assert events_of(asked, *first) == ["/", "hm/", "/ab", "/cd"]
        assert asked.told is not None
        asked.told.restart()
        again = [{"role": "assistant", "content": ""}, {"reasoning_content": "h"}, {"reasoning_content": "m"},
                 {"content": "abc"}, {"content": "de"}, {"content": "f"}]  # fmt: skip
        assert events_of(asked, *again) == ["-", "-", "-", "-", "/e", "/f"]
        asked.told.restart()
        last: list[dict[str, str]] = [{"reasoning_content": "hm"}, {"content": "abcdefg"}, {}]
        assert events_of(asked, *last, reason="stop") == ["-", "/g", "/"]

    @pytest.mark.parametrize(
        "other", [{"content": "ax"}, {"reasoning_content": "ab"}, {"content": "a", "reasoning_content": "x"}]
    )
    def test_another_answer_is_never_mixed_in(self, other: dict[str, Any]) -> None:
        asked = state(chat=True, temperature=0)
        events_of(asked, {"content": "ab"})
        assert asked.told is not None
        asked.told.restart()
        with pytest.raises(CannotResume):
            events_of(asked, other)

    def test_a_shorter_answer_is_not_taken_for_the_end(self) -> None:
        asked = state(chat=True, temperature=0)
        events_of(asked, {"content": "ab"})
        assert asked.told is not None
        asked.told.restart()
        with pytest.raises(CannotResume):
            events_of(asked, {"content": "a"}, {}, reason="stop")

    def test_streams_ask_for_counts_and_not_for_ids(self) -> None:
        body = decode_body(state(chat=True, messages=[]))
        assert "return_token_ids" not in body, "SGLang refuses it for a streamed chat"
        assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


PARTS = st.tuples(st.sampled_from(["reasoning_content", "content"]), st.text(min_size=1, max_size=4))


@given(st.lists(PARTS, max_size=8), st.data())
def test_retelling_gives_one_whole_answer(answer: list[tuple[str, str]], data: st.DataObject) -> None:
    """However often an answer is begun again, and however it is cut, the client gets each part once, in order."""
    letters = [(field, letter) for field, text in answer for letter in text]
    told, got = Retelling(), ""
    for attempt in range(3):
        if attempt:
            told.restart()
        until = len(letters) if attempt == 2 else data.draw(st.integers(0, len(letters)))
        for field, letter in letters[:until]:
            got += told.add(field, letter)
    assert got == "".join(letter for _, letter in letters)
    assert not told.is_repeating


class TestErrors:
    @pytest.mark.parametrize(
        ("status", "body", "expected"),
        [(400, {"object": "error", "message": "long", "type": "BadRequest", "param": None, "code": 400}, (400, False)),
         (500, {"object": "error", "message": "Prefill bootstrap failed for request x", "type": "500", "code": 500},
          (500, True)),
         (401, {"error": "Unauthorized"}, (401, False)),
         (503, {"error": {"message": "KV checksum mismatch", "type": "x", "code": 503}}, (503, True)),
         (502, "nonsense", (502, False))],
    )  # fmt: skip
    def test_refusals(self, status: int, body: object, expected: tuple[int, bool]) -> None:
        found = SPEAKS.parse_error(status, msgspec.json.encode(body))
        assert (found.status, found.kv_lost) == expected
        assert found.message

    @pytest.mark.parametrize(("code", "lost"), [(400, False), (500, True), (503, False)])
    def test_a_streams_error_has_its_own_status(self, code: int, lost: bool) -> None:
        message = "Decode transfer failed for request" if lost else "no"
        error = {"object": "error", "message": message, "type": "X", "param": None, "code": code}
        for parse in (SPEAKS.parse_event, SPEAKS.parse_prefill):
            with pytest.raises(EngineError) as raised:
                parse(msgspec.json.encode({"error": error}), state(prompt="x"))
            assert (raised.value.status, raised.value.kv_lost) == (code, lost)

    @pytest.mark.parametrize("chat", [False, True])
    def test_an_aborted_answer_is_no_answer(self, chat: bool) -> None:
        part = {"delta": {"content": "a"}} if chat else {"text": "a"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1}
        body = msgspec.json.encode({"choices": [{"index": 0, **part, "finish_reason": "abort"}], "usage": usage})
        for parse in (
            lambda: SPEAKS.parse_event(body, state(chat=chat)),
            lambda: SPEAKS.parse_prefill(body, state(chat=chat)),
            lambda: SPEAKS.parse_whole(body),
        ):
            with pytest.raises(EngineError, match="aborted"):
                parse()


def test_loads_are_seats_and_room() -> None:
    ranks = [{"num_used_tokens": 10, "max_total_num_tokens": 100, "max_running_requests": 4},
             {"num_used_tokens": 60, "max_total_num_tokens": 100, "max_running_requests": 4}]  # fmt: skip
    found = SPEAKS.parse_condition(200, msgspec.json.encode({"loads": ranks}))
    assert (found.usable, found.seats, found.kv_tokens_free) == (True, 8, 90)
    assert not SPEAKS.parse_condition(200, b'{"loads":[]}').usable, "no scheduler has published yet"
