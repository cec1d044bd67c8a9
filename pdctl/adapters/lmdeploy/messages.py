"""LMDeploy's DistServe messages, as engines of version 0.18 read and write them. Enumerations are numbers there."""

from __future__ import annotations

import ipaddress
from enum import IntEnum

import msgspec


class Transfer(IntEnum):
    """MigrationProtocol: how decode reads KV. Links and migration requests must name the same."""

    RDMA = 2
    NVLINK = 3


class LinkType(IntEnum):
    """RDMALinkType."""

    INFINIBAND = 1
    ROCE = 2


# DistServeConnectionStatus.SUCCESS
SUCCESS = 1
# Links and migration requests name the same one.
TRANSFER = Transfer.RDMA


class EngineConfig(msgspec.Struct, frozen=True):
    """GET /distserve/engine_info: a JSON string that has this JSON in it."""

    tp_size: int
    ep_size: int
    dp_size: int
    dp_rank: int
    block_size: int
    num_cpu_blocks: int
    num_gpu_blocks: int
    pp_size: int | None = None


class MigrationRequest(msgspec.Struct, frozen=True):
    """`migration_request` of a decode call: which KV it reads, and the token that prefill has sampled."""

    protocol: int
    remote_engine_id: str
    remote_session_id: int
    remote_token_id: int
    remote_block_ids: list[int]
    is_dummy_prefill: bool = False


class CacheFree(msgspec.Struct, frozen=True):
    """POST /distserve/free_cache."""

    remote_engine_id: str
    remote_session_id: int


_decode_text = msgspec.json.Decoder(str).decode
_decode_config = msgspec.json.Decoder(EngineConfig).decode


def engine_id(host: str, port: int) -> str:
    """An engine's id: its base URL."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_numeric(host: str) -> bool:
    """Whether an engine can listen for its peers on the host of its id: ZeroMQ binds to no names."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def parse_config(body: bytes) -> EngineConfig | None:
    """Read the answer at /distserve/engine_info; None for anything else."""
    try:
        return _decode_config(_decode_text(body))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def kv_tokens(body: bytes) -> int | None:
    """How many tokens of KV an engine has, from the answer at /distserve/engine_info."""
    config = parse_config(body)
    return None if config is None else config.num_gpu_blocks * config.block_size
