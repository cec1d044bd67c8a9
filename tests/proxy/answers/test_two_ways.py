"""An answer that an engine sends in one piece equals the one gathered from its stream, in every field."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from pdctl.engine.front.api.output import Piece, chunk_choice, whole_choice
from pdctl.proxy.answers.gather import Gathered

CALL = {"index": 0, "id": "call_r_0", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ENTRY = {"token": "a", "logprob": -0.5, "bytes": [97], "text_offset": 0,
         "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]}]}  # fmt: skip
PARTS = [{**CALL, "function": {"name": "f", "arguments": ""}},
         {"index": 0, "function": {"arguments": '{"a"'}}, {"index": 0, "function": {"arguments": ": 1}"}}]  # fmt: skip
TOLD: list[dict[str, object] | None] = [None, {"5": {"logprob": -1.0, "rank": 3, "decoded_token": "x"}}]
ANSWERS: dict[str, list[Piece]] = {
    "text": [Piece([1], "a", None), Piece([2], "", None), Piece([3], "b", "stop")],
    "a stop string": [Piece([1], "a", None), Piece([2], "", "stop", stop_reason="END")],
    "nothing": [Piece([1], "", "length")],
    "one piece": [Piece([1, 2], "ab", "stop")],
    "a call alone": [Piece([1], "", None), Piece([2], "", "tool_calls", None, [CALL])],
    "text and a call": [Piece([1], "so: ", None), Piece([2], "", "tool_calls", None, [CALL])],
    "two calls": [
        Piece([1], "", None, None, [CALL]),
        Piece([2], "", "tool_calls", None, [{**CALL, "index": 1, "id": "c1"}]),
    ],
    "a call in parts": [
        Piece([1], "", None, None, PARTS[:1]),
        Piece([2], "", None, None, PARTS[1:2]),
        Piece([3], "", "tool_calls", None, PARTS[2:]),
    ],
    "a call cut off": [Piece([1], "", None, None, PARTS[:1]), Piece([2], "", "length", None, PARTS[1:2])],
    "of the prompt": [Piece([1], "a", None, None, [], None, TOLD), Piece([2], "b", "stop")],
    "log probabilities": [Piece([1], "a", None, None, [], [ENTRY]), Piece([2], "", "stop", None, [], [ENTRY])],
}


# Completions have no tool calls.
CASES = [(name, True) for name in ANSWERS]
CASES += [(name, False) for name, pieces in ANSWERS.items() if not any(piece.calls for piece in pieces)]


@pytest.mark.parametrize(("name", "chat"), CASES)
def test_whole_and_gathered_are_equal(name: str, chat: bool) -> None:
    pieces = ANSWERS[name]
    gathered = Gathered(chat, with_token_ids=True)
    for number, piece in enumerate(pieces):
        raw = {
            key: msgspec.Raw(json.dumps(value).encode()) for key, value in chunk_choice(piece, chat, not number).items()
        }
        gathered.add(raw, piece.token_ids)
    found: dict[str, Any] = {key: json.loads(bytes(value)) for key, value in gathered.choice().items()}
    assert found.pop("token_ids") == [token for piece in pieces for token in piece.token_ids]
    assert found == json.loads(json.dumps(whole_choice(pieces, chat)))
