"""The few messages that cross process borders: hand-overs, leases, health."""

from __future__ import annotations

import hashlib
from array import array
from pathlib import Path
from typing import Annotated, ClassVar

import msgspec

SECRET_ENV = "PDCTL_SECRET"  # noqa: S105 - the variable's name, not a secret
UNIT_ENV = "PDCTL_UNIT"
EPOCH_ENV = "PDCTL_EPOCH"
LISTEN_FD_ENV = "PDCTL_LISTEN_FD"
# When the client's request began, in whole seconds since 1970: what a chat template takes for now.
STARTED_HEADER = "x-pdctl-started"
# Which router asks: it answers for the leases it is granted until a reader claims them.
ROUTER_HEADER = "x-pdctl-router"
# Names one prefill call. A router that gives the call up ends what it left by this name, answered or not.
ATTEMPT_HEADER = "x-pdctl-attempt"

# In whose name a request came: an opaque word for an API key, so that one tenant's costs do not delay another's.
TENANT_HEADER = "x-pdctl-tenant"

# Asks for, or carries, where a request's time went.
TIMING_HEADER = "x-pdctl-timing"

# An engine that cannot be cured by a restart (bad arguments, a refused model) exits with this; sysexits.h EX_CONFIG.
EXIT_CONFIG = 78


# What peers send is checked where it is decoded: a port that no socket takes, a lease too short to renew.
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Count = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
LeaseSeconds = Annotated[float, msgspec.Meta(ge=0.05, le=3600)]


class LayerShape(msgspec.Struct, frozen=True, array_like=True):
    """K and V geometry of one layer: heads and head sizes in elements."""

    kv_heads: int
    key_dim: int
    value_dim: int


class Manifest(msgspec.Struct, frozen=True):
    """What two KV pools must agree on before bytes may move between them, and their block sizes, which may differ."""

    model: str
    dtype: str
    block_size: Count
    layers: list[LayerShape]


class Served(msgspec.Struct, frozen=True):
    """One way to read a pool. `address` means what the transport says; `fallback`: why `protocol` is not as asked."""

    transport: str
    address: str
    protocol: str
    fallback: str = ""


class PoolEndpoint(msgspec.Struct, frozen=True):
    """Where a pool can be read. `host_id` is the same for processes that can map each other's memory."""

    host_id: str
    served: list[Served]
    num_blocks: int
    manifest: Manifest


class HandOver(msgspec.Struct, frozen=True):
    """`kv_transfer_params` of a prefill's answer, in vLLM's shape plus lease, epoch and first token.

    `token_digest` names the tokens that the KV was computed from: another prompt's KV is refused, not decoded.
    """

    remote_engine_id: str
    remote_request_id: str
    remote_host: str
    remote_port: Port
    remote_block_ids: list[int]
    remote_num_tokens: Count
    token_digest: str
    lease_id: str
    epoch: str
    lease_s: LeaseSeconds
    first_token_id: int
    endpoint: PoolEndpoint
    first_logprobs: list[tuple[int, float]] | None = None
    do_remote_prefill: bool = True
    do_remote_decode: bool = False


class Offer(msgspec.Struct, frozen=True):
    """A prefill that still computes lets `num_tokens` of KV be read as they come: the first `readable` now.

    `withdrawn`: they will not come after all, and what was read is void.
    """

    engine: str
    host: str
    port: Port
    lease_id: str
    epoch: str
    lease_s: LeaseSeconds
    num_tokens: Count
    readable: int
    block_ids: list[int]
    endpoint: PoolEndpoint
    withdrawn: bool = False


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


class AttemptCall(msgspec.Struct, frozen=True):
    """A router gave up a prefill call: its lease ends, and one that is still to come is not granted."""

    attempt: str


class HolderReply(msgspec.Struct, frozen=True):
    """How many leases ended."""

    released: int


class RevokeCall(msgspec.Struct, frozen=True):
    """Take a lease back, whoever holds it."""

    lease_id: str


class PeerAddress(msgspec.Struct, frozen=True):
    """An engine whose KV may be read."""

    name: str
    host: str
    port: Port
    epoch: str


class LinkCall(msgspec.Struct, frozen=True):
    """Make ready to read from these."""

    peers: list[PeerAddress]


class EndpointReply(msgspec.Struct, frozen=True):
    """Where an engine's pool can be read, in this epoch."""

    epoch: str
    endpoint: PoolEndpoint


class LinkInfo(msgspec.Struct, frozen=True):
    """How KV gets here from one peer. `gbps`: 10^9 bytes per second over the last transfers, 0 before the first.

    `refused`: it never will (their KV does not fit ours), as opposed to an `error` that may pass.
    """

    peer: str
    epoch: str
    transport: str = ""
    protocol: str = ""
    reason: str = ""
    fallback: str = ""
    error: str = ""
    refused: bool = False
    pulls: int = 0
    bytes: int = 0
    gbps: float = 0.0


class LinkReply(msgspec.Struct, frozen=True):
    """One entry for each peer asked for."""

    links: list[LinkInfo]


class LeaseInfo(msgspec.Struct, frozen=True):
    """One live lease as shown to people. `age_s`, `quiet_s` (since the last sign of life) in seconds, `bytes` of KV.

    `leak`: why it is past its purpose, or "".
    """

    id: str
    request_id: str
    holder: str
    state: str
    age_s: float
    quiet_s: float
    blocks: int
    bytes: int
    leak: str = ""


class EngineState(msgspec.Struct, frozen=True):
    """An engine's state, as its /pdctl/v1/state answers.

    `max_num_seqs`: sequences it runs at once; `block_size` in tokens. `silent_s`: for how long its core has owed an
    answer, which the longest step takes; more is a hang.
    Free, cached, referenced, leased and quarantined blocks make up the total; `blocks_reserved` of the referenced ones
    wait for KV. Cached ones are 0: there is no prefix cache yet.
    """

    name: str
    role: str
    epoch: str
    blocks_total: int
    blocks_free: int
    blocks_cached: int
    blocks_referenced: int
    blocks_leased: int
    blocks_quarantined: int
    blocks_reserved: int
    held_back: int
    running: int
    waiting: int
    tokens_total: int
    leases: list[LeaseInfo]
    links: list[LinkInfo]
    transfers: dict[str, float]
    block_size: int = 0
    max_num_seqs: int = 0
    steps_total: int = 0
    silent_s: float = 0.0


class EngineAddress(msgspec.Struct, frozen=True):
    """One engine as the proxy is told of it. `slot`: its number in what several workers share."""

    name: str
    role: str
    kind: str
    host: str
    port: int
    secret_file: str = ""
    slot: int = 0


class ProxyConfig(msgspec.Struct, frozen=True):
    """The proxy's settings, handed over in a file of the run directory.

    It reads the file anew when told to, and follows everything but what is in FIXED. `draining`: engines that get
    nothing new.
    """

    FIXED: ClassVar[tuple[str, ...]] = (
        "service", "model", "max_model_len", "workers", "run_dir", "tls_cert", "tls_key", "cors_origins",
        "otlp_endpoint",
    )  # fmt: skip

    service: str
    model: str
    routing: str
    ttft_ms: float
    tpot_ms: float
    max_model_len: int
    engines: list[EngineAddress]
    workers: int = 1
    run_dir: str = ""
    admission: str = "queue"
    max_queue: int = 256
    max_body_mb: float = 16.0
    unknown_fields: str = "warn"
    api_keys: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    cors_origins: list[str] = []
    access_log: str = ""
    otlp_endpoint: str = ""
    draining: list[str] = []
    drain_s: float = 5.0


class EngineLoad(msgspec.Struct, frozen=True):
    """What a proxy has at one engine: calls under way, and whether it may get more."""

    calls: int
    usable: bool


class PoolReply(msgspec.Struct, frozen=True):
    """A proxy's engines, by name, as its /pdctl/v1/pool and /pdctl/v1/reload answer."""

    engines: dict[str, EngineLoad]


def listener_path(run_dir: Path, name: str) -> Path:
    """Where a proxy gives its listening socket back."""
    return run_dir / "ipc" / f"{name}.listen"


def token_digest(token_ids: list[int]) -> str:
    """Names a sequence of token ids."""
    return hashlib.blake2b(array("I", token_ids).tobytes(), digest_size=16).hexdigest()
