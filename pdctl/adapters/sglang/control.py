"""The supervisor's only call to an SGLang engine: whether it makes progress."""

from __future__ import annotations

import msgspec

from pdctl.adapters import NoControl, Progress


class _Load(msgspec.Struct):
    """What one scheduler publishes, every few steps. `timestamp`: when."""

    timestamp: float = 0.0
    num_running_reqs: int = 0
    total_prefill_uncached_tokens: int = 0


class _Loads(msgspec.Struct):
    loads: list[_Load]


_decode_loads = msgspec.json.Decoder(_Loads).decode


class SglangControl(NoControl):
    """See Control. SGLang reports no leases or links; its role switch needs an idle engine that was started for it."""

    progress_path = "/v1/loads?include=core"

    def progress(self, body: bytes) -> Progress:
        """See Control.progress. Each scheduler publishes while it steps: a hung one publishes nothing new."""
        loads = _decode_loads(body).loads
        return Progress(
            running=sum(load.num_running_reqs for load in loads),
            tokens_total=sum(load.total_prefill_uncached_tokens for load in loads),
            steps_total=sum(int(load.timestamp * 1000) for load in loads),
        )


CONTROL = SglangControl()
