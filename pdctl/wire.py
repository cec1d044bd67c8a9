"""The few messages that cross process borders: hand-overs, leases, health."""

from __future__ import annotations

import hashlib
from array import array

import msgspec

SECRET_ENV = "PDCTL_SECRET"  # noqa: S105 - the variable's name, not a secret
UNIT_ENV = "PDCTL_UNIT"
EPOCH_ENV = "PDCTL_EPOCH"
LISTEN_FD_ENV = "PDCTL_LISTEN_FD"
# When the client's request began, in whole seconds since 1970: what a chat template takes for now.
STARTED_HEADER = "x-pdctl-started"

# An engine that cannot be cured by a restart (bad arguments, a refused model) exits with this; sysexits.h EX_CONFIG.
EXIT_CONFIG = 78


class LayerShape(msgspec.Struct, frozen=True, array_like=True):
    """K and V geometry of one layer: heads and head sizes in elements."""

    kv_heads: int
    key_dim: int
    value_dim: int


class Manifest(msgspec.Struct, frozen=True):
    """What two KV pools must agree on before bytes may move between them."""

    model: str
    dtype: str
    block_size: int
    layers: list[LayerShape]


class PoolEndpoint(msgspec.Struct, frozen=True):
    """Where a pool can be read. `address` means what the named transport says it means."""

    transport: str
    address: str
    num_blocks: int
    manifest: Manifest


class HandOver(msgspec.Struct, frozen=True):
    """`kv_transfer_params` of a prefill's answer, in vLLM's shape plus lease, epoch and first token.

    `token_digest` names the tokens that the KV was computed from: another prompt's KV is refused, not decoded.
    """

    remote_engine_id: str
    remote_request_id: str
    remote_host: str
    remote_port: int
    remote_block_ids: list[int]
    remote_num_tokens: int
    token_digest: str
    lease_id: str
    epoch: str
    lease_s: float
    first_token_id: int
    endpoint: PoolEndpoint
    do_remote_prefill: bool = True
    do_remote_decode: bool = False


class LeaseCall(msgspec.Struct, frozen=True):
    """Claim, commit or release one lease."""

    lease_id: str
    epoch: str
    holder: str


class RenewCall(msgspec.Struct, frozen=True):
    """Renew many leases of one prefill engine at once."""

    lease_ids: list[str]
    epoch: str
    holder: str


class LeaseReply(msgspec.Struct, frozen=True):
    """`ok`, or the reason why not."""

    ok: bool
    reason: str = ""


class RenewReply(msgspec.Struct, frozen=True):
    """The leases that are gone; every other one was renewed."""

    gone: list[str]


class HolderCall(msgspec.Struct, frozen=True):
    """Release everything `holder` claimed: it is known to be dead."""

    holder: str


class HolderReply(msgspec.Struct, frozen=True):
    """How many leases ended."""

    released: int


class LeaseInfo(msgspec.Struct, frozen=True):
    """One live lease as shown to people. `age_s` in seconds, `bytes` of KV."""

    id: str
    request_id: str
    holder: str | None
    state: str
    age_s: float
    blocks: int
    bytes: int


class EngineState(msgspec.Struct, frozen=True):
    """An engine's state, as its /pdctl/v1/state answers."""

    name: str
    role: str
    epoch: str
    blocks_total: int
    blocks_free: int
    blocks_leased: int
    blocks_reserved: int
    running: int
    waiting: int
    tokens_total: int
    leases: list[LeaseInfo]
    transfers: dict[str, float]


class EngineAddress(msgspec.Struct, frozen=True):
    """One engine as the proxy is told of it."""

    name: str
    role: str
    kind: str
    host: str
    port: int


class ProxyConfig(msgspec.Struct, frozen=True):
    """The proxy's settings, handed over in a file of the run directory."""

    service: str
    model: str
    routing: str
    ttft_ms: float
    tpot_ms: float
    max_model_len: int
    engines: list[EngineAddress]


def token_digest(token_ids: list[int]) -> str:
    """Names a sequence of token ids."""
    return hashlib.blake2b(array("I", token_ids).tobytes(), digest_size=16).hexdigest()
