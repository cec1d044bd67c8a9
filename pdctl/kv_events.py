"""vLLM's KV events: what an engine publishes of the blocks that can be found in it. SGLang's have the same form.

Frames of a PUB socket: topic, number of the batch (8 bytes, big endian), a batch in msgpack. A ROUTER socket replays:
after an empty frame and the first wanted number, it answers with the batches that it has kept, and END.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import msgspec

# The number after the last replayed batch.
END = (-1).to_bytes(8, "big", signed=True)
# vLLM's word for an engine's own pool, on any device.
OWN_POOL = "GPU"

# A block's name, which means something only to the engine.
BlockHash = int | bytes
_Token = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]


class BlockStored(msgspec.Struct, frozen=True, tag=True):
    """These blocks follow each other, the first one after `parent_block_hash`. `token_ids` is empty if tokens are not
    told."""

    block_hashes: Sequence[BlockHash]
    parent_block_hash: BlockHash | None
    token_ids: Sequence[_Token]
    block_size: int
    lora_id: int | str | None = None
    medium: str | None = OWN_POOL
    lora_name: str | None = None


class BlockRemoved(msgspec.Struct, frozen=True, tag=True):
    """These blocks cannot be found any more."""

    block_hashes: Sequence[BlockHash]
    medium: str | None = OWN_POOL


class AllBlocksCleared(msgspec.Struct, frozen=True, tag=True):
    """Nothing can be found."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """vLLM's KVEventBatch. `ts`: Unix time."""

    ts: float
    events: list[Event]
    data_parallel_rank: int | None = 0


class Endpoints(NamedTuple):
    """Where an engine publishes its events, and where it replays them, as ZeroMQ writes addresses."""

    events: str
    replay: str
