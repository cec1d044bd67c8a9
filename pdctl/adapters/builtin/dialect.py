"""Request bodies and answers of the builtin engine."""

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
)
from pdctl.latency import Work
from pdctl.net.openai.answers import first_choice, parse_answer, refusal, whole_counts
from pdctl.net.openai.api import Counts
from pdctl.net.openai.fields import KNOWN_FIELDS
from pdctl.proxy_wire import EngineAddress
from pdctl.wire import ATTEMPT_HEADER, AttemptCall, LeaseCall, MoveCall

PROXY_HOLDER = "proxy"
_ATTEMPT = ATTEMPT_HEADER.encode()


class _Lease(msgspec.Struct):
    lease_id: str
    epoch: str


class _Link(msgspec.Struct):
    peer: str
    error: str = ""


class _State(msgspec.Struct):
    block_size: int = 0
    blocks_total: int = 0
    blocks_free: int = 0
    max_num_seqs: int = 0
    links: list[_Link] = []
    work: Work | None = None


_encode = msgspec.json.Encoder().encode
_decode_lease = msgspec.json.Decoder(_Lease).decode
_decode_state = msgspec.json.Decoder(_State).decode


class BuiltinDialect:
    """Request bodies and answers of the builtin engine."""

    hand_shake = HandShake.SEQUENTIAL
    probe_path = "/pdctl/v1/state"
    keys_by_request_id = False
    own_envelopes = False
    resumes_at_text = False
    deterministic = True
    pairing = Pairing()
    verifies_leases = True
    tells_pieces = True
    tokenizer = None

    def known_fields(self, path: str) -> frozenset[str] | None:
        """See Dialect.known_fields."""
        return KNOWN_FIELDS[path]

    def client_ready(self, state: RequestState) -> bool:
        """See Dialect.client_ready. The engine's events already have the proxy's id and time."""
        return True

    def cannot_resume(self, state: RequestState) -> str:
        """See Dialect.cannot_resume. Sampling depends only on seed and position: every request continues exactly."""
        return ""

    def prefill_call(self, state: RequestState, attempt: Attempt) -> Call:
        """See Dialect.prefill_call."""
        params: dict[str, object] = {"do_remote_decode": True}
        # Engines of other kinds do not understand offers of chunks.
        if attempt.decode.kind == attempt.prefill.kind:
            params["offer_to"] = {"host": attempt.decode.host, "port": attempt.decode.port}
        extra = {"stream": False, "return_token_ids": True, "kv_transfer_params": params}
        return Call(state.path, _encode({**state.fields, **extra, **_resume(state)}))

    def decode_call(self, state: RequestState, attempt: Attempt, hand_over: bytes | None, stream: bool) -> Call:
        """See Dialect.decode_call."""
        extra: dict[str, object] = {"stream": stream}
        if stream:
            extra |= stream_fields(state)
        if hand_over is not None:
            extra["kv_transfer_params"] = msgspec.Raw(hand_over)
        # By this name the stream can be moved to another engine.
        name = b"%b: %b\r\n" % (_ATTEMPT, attempt.name.encode()) if stream else b""
        return Call(state.path, _encode({**state.fields, **extra, **_resume(state)}), name)

    def ending(self, state: RequestState) -> Choice | None:
        """See Dialect.ending. The engine sends the end itself, with any text that it held back."""
        return None

    def parse_error(self, status: int, body: bytes) -> EngineError:
        """See Dialect.parse_error."""
        return refusal(status, body)

    def parse_prefill(self, body: bytes, state: RequestState) -> Prefilled:
        """See Dialect.parse_prefill."""
        answer = parse_answer(200, body)
        found = first_choice(answer)
        if found is None:
            raise EngineError(502, "the prefill engine answered without choices", "bad_upstream")
        known, fields = found
        # Sinks take parts of a stream, but this answer is a complete message.
        if state.chat and "message" in fields:
            fields["delta"] = fields.pop("message")
        held = bytes(answer.kv_transfer_params)
        goes_on = held != b"null"
        if goes_on:
            # A complete answer always has a finish_reason, but decode continues this one.
            fields["finish_reason"] = msgspec.Raw(b"null")
        return Prefilled(
            token_ids=known.token_ids or [],
            choice=shown(fields, "token_ids"),
            finish_reason=None if goes_on else known.finish_reason,
            prompt_tokens=answer.prompt_tokens,
            cached_tokens=answer.cached_tokens,
            hand_over=held if goes_on else None,
        )

    def parse_event(self, data: bytes, state: RequestState) -> Delta:
        """See Dialect.parse_event."""
        answer = parse_answer(200, data)
        found = first_choice(answer)
        if found is None:
            held = bytes(answer.kv_transfer_params)
            return Delta([], None, None, answer.counts, hand_over=None if held == b"null" else held)
        known, fields = found
        return Delta(known.token_ids or [], shown(fields, "token_ids"), known.finish_reason, answer.counts)

    def parse_whole(self, body: bytes) -> Counts:
        """See Dialect.parse_whole."""
        return whole_counts(body)

    def parse_condition(self, status: int, body: bytes) -> Condition:
        """See Dialect.parse_condition."""
        try:
            state = _decode_state(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return Condition(usable=False)
        lost = frozenset(link.peer for link in state.links if link.error)
        room = state.blocks_free * state.block_size
        return Condition(status == 200 and state.blocks_total > 0, state.max_num_seqs or None, room, lost, state.work)

    def give_up_call(self, attempt: str) -> Call | None:
        """See Dialect.give_up_call."""
        return Call("/pdctl/v1/attempts/release", _encode(AttemptCall(attempt)))

    def give_up_decode_call(self, attempt: str) -> Call | None:
        """See Dialect.give_up_decode_call."""
        return None

    def move_call(self, attempt: str, to: EngineAddress) -> Call | None:
        """See Dialect.move_call."""
        return Call("/pdctl/v1/moves", _encode(MoveCall(attempt, to.host, to.port)))

    def release_call(self, hand_over: bytes) -> Call | None:
        """See Dialect.release_call."""
        try:
            held = _decode_lease(hand_over)
        except (msgspec.DecodeError, UnicodeDecodeError):
            # The engine's answer names no lease that it could release.
            return None
        call = LeaseCall(lease_id=held.lease_id, epoch=held.epoch, holder=PROXY_HOLDER)
        return Call("/pdctl/v1/leases/release", _encode(call))


DIALECT = BuiltinDialect()


def _resume(state: RequestState) -> dict[str, object]:
    return {"resume_token_ids": state.emitted} if state.emitted else {}
