"""Request bodies and answers of an echo engine: a concurrent hand-shake, in which both engines get the same room."""

from __future__ import annotations

import msgspec

from pdctl.adapters import (
    Attempt,
    Call,
    Choice,
    Condition,
    Delta,
    EngineError,
    HandShake,
    Pairing,
    Prefilled,
    RequestState,
    shown,
    stream_fields,
)  # fmt: skip
from pdctl.net.openai.answers import first_choice, parse_answer, refusal, whole_counts
from pdctl.net.openai.api import Counts
from pdctl.proxy_wire import EngineAddress

_encode = msgspec.json.Encoder().encode


class EchoDialect:
    """See Dialect."""

    hand_shake = HandShake.CONCURRENT
    probe_path = "/health"
    keys_by_request_id = False
    own_envelopes = False
    resumes_at_text = False
    deterministic = True
    pairing = Pairing()
    verifies_leases = True
    tells_pieces = False
    tokenizer = None

    def known_fields(self, path: str) -> frozenset[str] | None:
        """See Dialect.known_fields."""
        return None

    def client_ready(self, state: RequestState) -> bool:
        """See Dialect.client_ready."""
        return True

    def cannot_resume(self, state: RequestState) -> str:
        """See Dialect.cannot_resume."""
        return "an echo engine answers chats once" if state.chat else ""

    def prefill_call(self, state: RequestState, attempt: Attempt) -> Call:
        """See Dialect.prefill_call."""
        return self._call(state, {"stream": False, "keep": attempt.name})

    def decode_call(self, state: RequestState, attempt: Attempt, hand_over: bytes | None, stream: bool) -> Call:
        """See Dialect.decode_call."""
        extra = {"stream": stream, **(stream_fields(state) if stream else {})}
        if attempt.prefill != attempt.decode:
            extra["fetch"] = f"{attempt.prefill.host}:{attempt.prefill.ports['bootstrap']}/{attempt.name}"
        return self._call(state, extra)

    def _call(self, state: RequestState, extra: dict[str, object]) -> Call:
        return Call(state.path, _encode({**state.fields, **extra, "so_far": len(state.emitted)}))

    def ending(self, state: RequestState) -> Choice | None:
        """See Dialect.ending."""
        return None

    def parse_error(self, status: int, body: bytes) -> EngineError:
        """See Dialect.parse_error."""
        return refusal(status, body)

    def parse_prefill(self, body: bytes, state: RequestState) -> Prefilled:
        """See Dialect.parse_prefill. Decode sends the complete answer."""
        return Prefilled([], {}, None, parse_answer(200, body).prompt_tokens, None)

    def parse_event(self, data: bytes, state: RequestState) -> Delta:
        """See Dialect.parse_event."""
        answer = parse_answer(200, data)
        if (found := first_choice(answer)) is None:
            return Delta([], None, None, answer.counts)
        known, fields = found
        return Delta(known.token_ids or [], shown(fields, "token_ids"), known.finish_reason, answer.counts)

    def parse_whole(self, body: bytes) -> Counts:
        """See Dialect.parse_whole."""
        return whole_counts(body)

    def parse_condition(self, status: int, body: bytes) -> Condition:
        """See Dialect.parse_condition."""
        return Condition(usable=status == 200)

    def give_up_call(self, attempt: str) -> Call | None:
        """See Dialect.give_up_call."""
        return Call("/forget", _encode({"keep": attempt}))

    def give_up_decode_call(self, attempt: str) -> Call | None:
        """See Dialect.give_up_decode_call."""
        return None

    def move_call(self, attempt: str, to: EngineAddress) -> Call | None:
        """See Dialect.move_call. Its streams end where they began."""
        return None

    def release_call(self, hand_over: bytes) -> Call | None:
        """See Dialect.release_call. There is no hand-over to release."""
        return None


DIALECT = EchoDialect()
