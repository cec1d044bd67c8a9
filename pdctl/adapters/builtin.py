"""The builtin engine: `python -m pdctl.engine`, vLLM's PD dialect with leases and resumption added."""

from __future__ import annotations

import msgspec

from pdctl.adapters import (
    Assignment,
    Call,
    Choice,
    Condition,
    Delta,
    EngineError,
    Launch,
    Prefilled,
    RequestState,
    shown,
    stream_fields,
)
from pdctl.net.openai_fields import KNOWN_FIELDS
from pdctl.topology.spec import Device, Topology, Transfer
from pdctl.wire import AttemptCall, EngineAddress, LeaseCall

PROXY_HOLDER = "proxy"


class BuiltinLauncher:
    """Command line and environment of the builtin engine."""

    def launch(self, topology: Topology, assignment: Assignment) -> Launch:
        """See Launcher.launch."""
        group = assignment.group
        argv = (
            assignment.python, "-m", "pdctl.engine", "serve",
            "--name", assignment.name,
            "--role", group.role.value,
            "--model", assignment.model_path,
            "--served-model-name", topology.service.served_model_name,
            "--host", "127.0.0.1",
            "--port", str(assignment.port),
            "--device", group.device.value,
            "--max-model-len", str(topology.service.max_model_len),
            "--max-num-seqs", str(group.max_num_seqs),
            "--max-num-batched-tokens", str(group.max_num_batched_tokens),
            "--kv-cache-gb", f"{group.kv_cache_gb:g}",
            "--block-size", str(group.block_size),
            *_transfer_argv(topology.transfer, assignment.rdma),
            "--open", str(group.open).lower(),
            "--run-dir", str(assignment.run_dir),
        )  # fmt: skip
        env = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
        if group.device is Device.CPU:
            # One thread per engine: OpenMP barriers between engines that share cores cost 10x and more.
            env |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        elif assignment.gpu_uuid:
            env |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": assignment.gpu_uuid}
        return Launch(
            argv=argv,
            env=env,
            ready_path="/health",
            state_path="/pdctl/v1/state",
            generate_path="/v1/completions",
        )


def _transfer_argv(transfer: Transfer, devices: tuple[str, ...]) -> tuple[str, ...]:
    return (
        "--transfer", transfer.backend,
        "--transfer-protocol", transfer.protocol,
        "--transfer-devices", ",".join(devices),
        "--transfer-ports", "-".join(map(str, transfer.ports)),
        "--lease-s", f"{transfer.lease_s:g}",
        "--read-s", f"{transfer.read_s:g}",
        "--leased-max", f"{transfer.leased_max:g}",
        "--chunked", str(transfer.chunked).lower(),
    )  # fmt: skip


LAUNCHER = BuiltinLauncher()


class _Choice(msgspec.Struct):
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Error(msgspec.Struct):
    message: str = "the engine failed without a message"
    type: str = "server_error"
    param: str | None = None


class _Answer(msgspec.Struct):
    choices: list[msgspec.Raw] = []
    usage: _Usage | None = None
    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"null")
    error: _Error | None = None


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


_encode = msgspec.json.Encoder().encode
_decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_choice = msgspec.json.Decoder(_Choice).decode
_decode_fields = msgspec.json.Decoder(Choice).decode
_decode_lease = msgspec.json.Decoder(_Lease).decode
_decode_state = msgspec.json.Decoder(_State).decode


class BuiltinDialect:
    """Bodies and answers of the builtin engine."""

    probe_path = "/pdctl/v1/state"
    keys_by_request_id = False
    own_envelopes = False
    resumes_at_text = False

    def known_fields(self, path: str) -> frozenset[str] | None:
        """See Dialect.known_fields."""
        return KNOWN_FIELDS[path]

    def client_ready(self, state: RequestState) -> bool:
        """See Dialect.client_ready. Id and time of its events are those the proxy gives."""
        return True

    def prefill_call(self, state: RequestState, decode: EngineAddress) -> Call:
        """See Dialect.prefill_call."""
        params: dict[str, object] = {"do_remote_decode": True}
        if decode.kind == "builtin":
            params["offer_to"] = {"host": decode.host, "port": decode.port}
        extra = {"stream": False, "return_token_ids": True, "kv_transfer_params": params}
        return Call(state.path, _encode({**state.fields, **extra, **_resume(state)}))

    def decode_call(self, state: RequestState, hand_over: bytes | None, stream: bool) -> Call:
        """See Dialect.decode_call."""
        extra: dict[str, object] = {"stream": stream}
        if stream:
            extra |= stream_fields(state)
        if hand_over is not None:
            extra["kv_transfer_params"] = msgspec.Raw(hand_over)
        return Call(state.path, _encode({**state.fields, **extra, **_resume(state)}))

    def ending(self, state: RequestState) -> Choice | None:
        """See Dialect.ending. The engine does that itself, with the text it may have held back."""
        return None

    def parse_prefill(self, status: int, body: bytes, state: RequestState) -> Prefilled:
        """See Dialect.parse_prefill."""
        answer = _parsed(status, body)
        if not answer.choices:
            raise EngineError(502, "the prefill engine answered without choices", "bad_upstream")
        known, fields = _decode_choice(answer.choices[0]), _decode_fields(answer.choices[0])
        if state.chat and "message" in fields:
            fields["delta"] = fields.pop("message")
        held = bytes(answer.kv_transfer_params)
        goes_on = held != b"null"
        if goes_on:
            fields["finish_reason"] = msgspec.Raw(b"null")
        return Prefilled(
            token_ids=known.token_ids or [],
            choice=shown(fields, "token_ids"),
            finish_reason=None if goes_on else known.finish_reason,
            prompt_tokens=answer.usage.prompt_tokens if answer.usage else 0,
            hand_over=held if goes_on else None,
        )

    def parse_event(self, data: bytes, state: RequestState) -> Delta:
        """See Dialect.parse_event."""
        answer = _parsed(200, data)
        counts = (answer.usage.prompt_tokens, answer.usage.completion_tokens) if answer.usage else None
        if not answer.choices:
            return Delta([], None, None, counts)
        known, fields = _decode_choice(answer.choices[0]), _decode_fields(answer.choices[0])
        return Delta(known.token_ids or [], shown(fields, "token_ids"), known.finish_reason, counts)

    def parse_whole(self, body: bytes) -> tuple[int, int]:
        """See Dialect.parse_whole."""
        answer = _parsed(200, body)
        if not answer.choices or answer.usage is None:
            raise EngineError(502, "the engine answered without choices or usage", "bad_upstream")
        return answer.usage.prompt_tokens, answer.usage.completion_tokens

    def parse_condition(self, status: int, body: bytes) -> Condition:
        """See Dialect.parse_condition."""
        try:
            state = _decode_state(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return Condition(usable=False)
        lost = frozenset(link.peer for link in state.links if link.error)
        room = state.blocks_free * state.block_size
        return Condition(status == 200 and state.blocks_total > 0, state.max_num_seqs or None, room, lost)

    def give_up_call(self, attempt: str) -> Call | None:
        """See Dialect.give_up_call."""
        return Call("/pdctl/v1/attempts/release", _encode(AttemptCall(attempt)))

    def release_call(self, hand_over: bytes) -> Call | None:
        """See Dialect.release_call."""
        held = _decode_lease(hand_over)
        call = LeaseCall(lease_id=held.lease_id, epoch=held.epoch, holder=PROXY_HOLDER)
        return Call("/pdctl/v1/leases/release", _encode(call))


def dialect() -> BuiltinDialect:
    """One per proxy process."""
    return BuiltinDialect()


def _parsed(status: int, body: bytes) -> _Answer:
    try:
        answer = _decode_answer(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as failure:
        raise EngineError(502, f"the engine's answer is not what was agreed: {failure}", "bad_upstream") from None
    if status >= 400 or answer.error:
        error = answer.error or _Error()
        code = status if status >= 400 else 500
        raise EngineError(code, error.message, error.type, error.type == "kv_lost", error.param)
    return answer


def _resume(state: RequestState) -> dict[str, object]:
    return {"resume_token_ids": state.emitted} if state.emitted else {}
