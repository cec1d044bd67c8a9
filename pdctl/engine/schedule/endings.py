"""When a sequence's output ends."""

from __future__ import annotations

from pdctl.engine.schedule.batch import Limits
from pdctl.engine.schedule.sequence import Sequence


def finish_reason(sequence: Sequence, limits: Limits) -> str | None:
    """Why the newest token is the last one; None if it is not."""
    token_id, sampling = sequence.token_ids[-1], sequence.sampling
    if token_id in limits.eos_token_ids and not sampling.ignore_eos:
        return "stop"
    if token_id in sampling.stop_token_ids and sequence.num_output > sampling.min_tokens:
        return "stop"
    return "length" if ends_at(sequence, len(sequence.token_ids), limits) else None


def ends_at(sequence: Sequence, length: int, limits: Limits) -> bool:
    """Whether the output ends with this total of tokens, whatever they are."""
    if length >= limits.max_model_len:
        return True
    num_output = length - sequence.prompt_len
    # A held prefill of a new prompt never ends by length: routers request one token, and decode continues from it.
    return num_output >= sequence.sampling.max_tokens and not (sequence.hold and num_output == 1)
