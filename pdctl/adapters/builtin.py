"""The builtin engine: `python -m pdctl.engine`, vLLM's PD dialect with leases and resumption added."""

from __future__ import annotations

import msgspec

from pdctl.adapters import Assignment, Delta, EngineError, Launch, Prefilled
from pdctl.topology import Device, Topology, Transfer
from pdctl.wire import AttemptCall, EngineAddress, HandOver, LeaseCall

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
            *_transfer_argv(topology.transfer),
            "--run-dir", str(assignment.run_dir),
        )  # fmt: skip
        env = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
        if group.device is Device.CPU:
            # One thread per engine: OpenMP barriers between engines that share cores cost 10x and more.
            env |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        elif assignment.gpu_uuid:
            env |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": assignment.gpu_uuid}
        return Launch(argv=argv, env=env, ready_path="/health")


def _transfer_argv(transfer: Transfer) -> tuple[str, ...]:
    return (
        "--transfer", transfer.backend,
        "--transfer-protocol", transfer.protocol,
        "--transfer-devices", ",".join(transfer.devices),
        "--transfer-ports", "-".join(map(str, transfer.ports)),
        "--lease-s", f"{transfer.lease_s:g}",
        "--read-s", f"{transfer.read_s:g}",
        "--leased-max", f"{transfer.leased_max:g}",
        "--chunked", str(transfer.chunked).lower(),
    )  # fmt: skip


LAUNCHER = BuiltinLauncher()


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    message: _Message | None = None
    delta: _Message | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Error(msgspec.Struct):
    message: str = "the engine failed without a message"
    type: str = "server_error"


class _Answer(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    kv_transfer_params: HandOver | None = None
    error: _Error | None = None


class BuiltinDialect:
    """Bodies and answers of the builtin engine."""

    def __init__(self) -> None:
        self._encode = msgspec.json.Encoder().encode
        self._decode = msgspec.json.Decoder(_Answer).decode

    def prefill_body(self, fields: dict[str, object], resume: list[int], decode: EngineAddress) -> bytes:
        """See Dialect.prefill_body."""
        params: dict[str, object] = {"do_remote_decode": True}
        if decode.kind == "builtin":
            params["offer_to"] = {"host": decode.host, "port": decode.port}
        extra = {"stream": False, "return_token_ids": True, "kv_transfer_params": params}
        return self._encode({**_without(fields, "stream_options"), **extra, **_resume(resume)})

    def decode_body(self, fields: dict[str, object], resume: list[int], hand_over: HandOver | None) -> bytes:
        """See Dialect.decode_body."""
        extra: dict[str, object] = {
            "stream": True, "return_token_ids": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        if hand_over is not None:
            extra["kv_transfer_params"] = hand_over
        return self._encode({**fields, **extra, **_resume(resume)})

    def parse_prefill(self, status: int, body: bytes, chat: bool) -> Prefilled:
        """See Dialect.parse_prefill."""
        answer = self._parse(status, body)
        if not answer.choices:
            raise EngineError(502, "the prefill engine answered without choices", "bad_upstream")
        choice = answer.choices[0]
        text = (choice.message.content if chat and choice.message else choice.text) or ""
        return Prefilled(
            token_ids=choice.token_ids or [],
            text=text,
            finish_reason=None if answer.kv_transfer_params else choice.finish_reason,
            prompt_tokens=answer.usage.prompt_tokens if answer.usage else 0,
            hand_over=answer.kv_transfer_params,
        )

    def parse_event(self, data: bytes, chat: bool) -> Delta:
        """See Dialect.parse_event."""
        answer = self._parse(200, data)
        counts = (answer.usage.prompt_tokens, answer.usage.completion_tokens) if answer.usage else None
        if not answer.choices:
            return Delta([], "", None, counts)
        choice = answer.choices[0]
        text = (choice.delta.content if chat and choice.delta else choice.text) or ""
        return Delta(choice.token_ids or [], text, choice.finish_reason, counts)

    def give_up_call(self, attempt: str) -> tuple[str, bytes]:
        """See Dialect.give_up_call."""
        return "/pdctl/v1/attempts/release", self._encode(AttemptCall(attempt))

    def release_call(self, hand_over: HandOver) -> tuple[str, bytes]:
        """See Dialect.release_call."""
        call = LeaseCall(lease_id=hand_over.lease_id, epoch=hand_over.epoch, holder=PROXY_HOLDER)
        return "/pdctl/v1/leases/release", self._encode(call)

    def _parse(self, status: int, body: bytes) -> _Answer:
        try:
            answer = self._decode(body)
        except msgspec.DecodeError as failure:
            raise EngineError(502, f"the engine's answer is not what was agreed: {failure}", "bad_upstream") from None
        if status >= 400 or answer.error:
            error = answer.error or _Error()
            raise EngineError(status if status >= 400 else 500, error.message, error.type, error.type == "kv_lost")
        return answer


def dialect() -> BuiltinDialect:
    """One per proxy process."""
    return BuiltinDialect()


def _without(fields: dict[str, object], key: str) -> dict[str, object]:
    return {name: value for name, value in fields.items() if name != key}


def _resume(token_ids: list[int]) -> dict[str, object]:
    return {"resume_token_ids": token_ids} if token_ids else {}
