"""The messages between processes: hand-overs, leases, health."""

from __future__ import annotations

import hashlib
from array import array
from typing import Annotated

import msgspec

from pdctl.latency import Work

SECRET_ENV = "PDCTL_SECRET"  # noqa: S105 - the variable's name, not a secret
UNIT_ENV = "PDCTL_UNIT"
EPOCH_ENV = "PDCTL_EPOCH"
LISTEN_FD_ENV = "PDCTL_LISTEN_FD"
# When the client's request began, in whole seconds since 1970: the current time for chat templates.
STARTED_HEADER = "x-pdctl-started"
# The version that began the answer: an engine of another version, in the middle of an upgrade, does not sign it.
FINGERPRINT_HEADER = "x-pdctl-fingerprint"
# The calling router: it holds the leases it is granted until a reader claims them.
ROUTER_HEADER = "x-pdctl-router"
# Identifies one call. A router that abandons a prefill ends its lease by this id, answered or not, and has a stream
# moved by it.
ATTEMPT_HEADER = "x-pdctl-attempt"

# The tenant of a request: an opaque id of its API key, so that one tenant's load does not delay another's.
# The targets of the service, in milliseconds: for the first token, and for each later one.
SLO_HEADER = "x-pdctl-slo"
TENANT_HEADER = "x-pdctl-tenant"
# The place of a request in an engine's queue, before its own priority: a whole number, lower goes first.
ORDER_HEADER = "x-pdctl-order"

# The names of a prompt's first pieces, see net.beginnings; and where an engine tells which of them it has.
BEGINNING_HEADER = "x-pdctl-beginning"
PIECES_PATH = "/pdctl/v1/pieces"

# The role epoch in which the sender knows the engine. A request for a role that the engine has left is refused.
ROLE_EPOCH_HEADER = "x-pdctl-role-epoch"
# The type of that refusal.
ROLE_CHANGED = "role_changed"

# In a request: asks for the durations of its stages. In an answer: carries them.
TIMING_HEADER = "x-pdctl-timing"

# Exit code of an engine that a restart cannot fix (bad arguments, an unsupported model); sysexits.h EX_CONFIG.
EXIT_CONFIG = 78
# Exit code of a supervisor whose ports another service claimed first: a new plan may start; sysexits.h EX_TEMPFAIL.
EXIT_PORTS_TAKEN = 75


# Peers' messages are validated when decoded: for example an impossible port, or a lease too short to renew.
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Count = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
LeaseSeconds = Annotated[float, msgspec.Meta(ge=0.05, le=3600)]
# Devices of one engine.
MOST_RANKS = 64
# Of a model.
MOST_LAYERS = 4096


class LayerShape(msgspec.Struct, frozen=True, array_like=True):
    """K and V geometry of one layer: heads and head sizes in elements."""

    kv_heads: int
    key_dim: int
    value_dim: int


class Manifest(msgspec.Struct, frozen=True):
    """What must match between two KV pools before they may exchange bytes. Only `block_size` and `segment` may differ.
    `segment`: prompts are computed in segments of so many tokens; 0: as the budget allows."""

    model: str
    dtype: str
    block_size: Count
    layers: list[LayerShape]
    segment: int = 0


class Part(msgspec.Struct, frozen=True, array_like=True):
    """What one device has of an engine's KV: in each of its layers the heads of rank `rank` of `ranks`, which share
    them evenly. If there are fewer heads than ranks, several ranks have the same one. `layers`: so many, from
    `first_layer` on; 0: all."""

    rank: int = 0
    ranks: int = 1
    first_layer: int = 0
    layers: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks <= MOST_RANKS:
            raise ValueError(f"there is no rank {self.rank} of {self.ranks}")
        if not 0 <= self.first_layer <= MOST_LAYERS or not 0 <= self.layers <= MOST_LAYERS:
            raise ValueError(f"there are no {self.layers} layers from {self.first_layer} on")
        if self.first_layer and not self.layers:
            raise ValueError("a part that has all layers begins with the first")


class Served(msgspec.Struct, frozen=True):
    """One way to read a pool. The transport defines `address`; `fallback`: why `protocol` is not the configured one."""

    transport: str
    address: str
    protocol: str
    fallback: str = ""


class PoolEndpoint(msgspec.Struct, frozen=True):
    """Where one pool can be read. `host_id` is the same for processes that can map each other's memory. `manifest`: of
    the engine's whole KV, of which the pool has a `part`."""

    host_id: str
    served: list[Served]
    num_blocks: int
    manifest: Manifest
    part: Part = Part()


class KvEndpoint(msgspec.Struct, frozen=True):
    """Where an engine's KV can be read: a pool for each of its devices. A block has one id in all of them."""

    shards: Annotated[tuple[PoolEndpoint, ...], msgspec.Meta(min_length=1, max_length=MOST_RANKS)]

    @property
    def manifest(self) -> Manifest:
        """Of the whole KV."""
        return self.shards[0].manifest


class HandOver(msgspec.Struct, frozen=True):
    """`kv_transfer_params` of a prefill's answer, in vLLM's shape plus lease, epoch and first token.

    `token_digest` identifies the tokens that the KV was computed from, so that another prompt's KV is rejected.
    `cached_tokens`: those that were not computed for it. `moved`: in the middle of an answer.
    `seal`: proof that an engine of this run made it, if it travels through a router without the run's secret.
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
    endpoint: KvEndpoint
    first_logprobs: list[tuple[int, float]] | None = None
    cached_tokens: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 0
    moved: bool = False
    do_remote_prefill: bool = True
    do_remote_decode: bool = False
    seal: str = ""


class Offer(msgspec.Struct, frozen=True):
    """A request in progress offers `num_tokens` of KV to be read as they are computed; `readable`: ready now.

    `withdrawn`: the prefill was abandoned, and what was read is invalid. `token_ids` and `salt`: of the KV's tokens, so
    that blocks which the reader has itself are not read; only in the first offer, or empty.
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
    endpoint: KvEndpoint
    withdrawn: bool = False
    token_ids: list[TokenId] = []
    salt: str = ""


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
    """`ok`, or else the `reason`."""

    ok: bool
    reason: str = ""


class RenewReply(msgspec.Struct, frozen=True):
    """The leases that no longer exist; all others were renewed."""

    gone: list[str]


class HolderCall(msgspec.Struct, frozen=True):
    """Release everything that `holder` claimed, because it is known to be dead."""

    holder: str


class AttemptCall(msgspec.Struct, frozen=True):
    """A router abandoned a prefill call, or an engine a call for a loan: its lease ends, or is not granted if the call
    has not finished."""

    attempt: str


class MoveCall(msgspec.Struct, frozen=True):
    """A router wants the stream of this attempt to go on elsewhere; it ends with a hand-over. `host`, `port`: the
    engine that will read it."""

    attempt: str
    host: str
    port: Port


class MoveReply(msgspec.Struct, frozen=True):
    """Whether a stream of this name runs. It may still end where it is."""

    ok: bool


class SessionCall(msgspec.Struct, frozen=True):
    """A decode engine asks for the hand-over of a session, which it has from LMDeploy's proxy."""

    session: int


class SessionReply(msgspec.Struct, frozen=True):
    """The session's hand-over, once; None for a session that is unknown, freed, or was asked for before."""

    hand_over: HandOver | None


class HolderReply(msgspec.Struct, frozen=True):
    """How many leases ended."""

    released: int


class RoleCall(msgspec.Struct, frozen=True):
    """What an engine is from now on; the answer says what it is. A call of an earlier `epoch` changes nothing."""

    role: Annotated[str, msgspec.Meta(pattern="^(prefill|decode|hybrid)$")]
    epoch: int = 0


class RevokeCall(msgspec.Struct, frozen=True):
    """Revoke a lease, whoever holds it."""

    lease_id: str


class PeerAddress(msgspec.Struct, frozen=True):
    """An engine whose KV may be read."""

    name: str
    host: str
    port: Port
    epoch: str


class LinkCall(msgspec.Struct, frozen=True):
    """Prepare to read from these peers."""

    peers: list[PeerAddress]


class NeighboursCall(msgspec.Struct, frozen=True):
    """All other engines of this kind that run, instead of those of the call before: any may have KV of a prompt's
    beginning. The answer says how many are followed."""

    peers: list[PeerAddress]


class NeighboursReply(msgspec.Struct, frozen=True):
    """How many engines are followed."""

    followed: int


class BlocksCall(msgspec.Struct, frozen=True):
    """What changed after the change `after` of the start `epoch` in what can be found? An answer comes when something
    has, or after `wait_s` seconds."""

    epoch: str
    after: int
    wait_s: Annotated[float, msgspec.Meta(ge=0, le=60)]


class BlocksReply(msgspec.Struct, frozen=True):
    """The names of blocks, shortened to 64 bits, that can be found since then or not any more; `whole`: all that can be
    found, because what was asked for is not known. `sequence`: of the newest change."""

    epoch: str
    sequence: int
    whole: bool
    stored: list[int]
    removed: list[int]


class PrefixCall(msgspec.Struct, frozen=True):
    """Lend the KV of as many of a prompt's first tokens as there are to `holder`. `attempt`: its name for this call, by
    which it gives up a loan that it got no answer about (AttemptCall)."""

    holder: str
    attempt: str
    token_ids: list[TokenId]
    salt: str


class PrefixReply(msgspec.Struct, frozen=True):
    """A lease on it, whose offer has no tokens; None: there is no such KV, or too much is leased."""

    offer: Offer | None


class EndpointReply(msgspec.Struct, frozen=True):
    """Where an engine's KV can be read, in this epoch."""

    epoch: str
    endpoint: KvEndpoint


class LinkInfo(msgspec.Struct, frozen=True):
    """How KV is read from one peer. `gbps`: 10^9 bytes per second over the last transfers, 0 before the first.

    `refused`: a permanent error (the KV layouts do not match), unlike an `error`, which may be temporary.
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
    """One entry for each peer of the call."""

    links: list[LinkInfo]


class LeaseInfo(msgspec.Struct, frozen=True):
    """One live lease as shown to users. `quiet_s`: seconds since the last grant, claim or renewal; `bytes` of KV.

    `leak`: why the lease counts as leaked, or "".
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
    """An engine's state, as /pdctl/v1/state returns it.

    `max_num_seqs`: sequences it runs at once; `block_size` in tokens. `silent_s`: how long its core has not answered;
    longer than the longest step is a hang.
    Free, referenced, leased and quarantined blocks add up to the total; `blocks_reserved` of the referenced ones wait
    for KV, and `blocks_cached` of the free ones keep KV for prompts with the same beginning. `counters`: more counts
    since the start, which depend on the engine's kind. `work`: predicts its steps; None while it loads.
    `attention`: how a builtin engine computes attention, and why; `cuda_graphs`: its
    decode steps that are CUDA graphs, or why none is. `prefills`: prompts for peers that are computed, or whose KV is
    kept; `answers`: other requests.
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
    counters: dict[str, int] = {}
    work: Work | None = None
    attention: str = ""
    cuda_graphs: str = ""
    role_epoch: int = 0
    prefills: int = 0
    answers: int = 0


def token_digest(token_ids: list[int]) -> str:
    """A digest that identifies a sequence of token ids."""
    return hashlib.blake2b(array("I", token_ids).tobytes(), digest_size=16).hexdigest()
