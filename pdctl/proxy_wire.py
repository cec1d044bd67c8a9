"""What supervisor and proxy tell each other: the proxy's settings, and its view of the engines."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import msgspec

from pdctl.kv_events import Endpoints


class EngineAddress(msgspec.Struct, frozen=True):
    """One engine as the proxy is told of it.

    `slot`: its number in what several workers share; `ports`: what it opens beside its API, by purpose; `connector`:
    how it exchanges KV, "" for kinds with only one way; `inline`: as a decode engine it also takes whole requests;
    `role_epoch`: counts the changes of its role; `tls`: it wants certificates of the cluster;
    `kv_events`: where it publishes which blocks it has, None if nowhere.
    """

    name: str
    role: str
    kind: str
    host: str
    port: int
    secret_file: str = ""
    slot: int = 0
    ports: dict[str, int] = {}
    connector: str = ""
    inline: bool = False
    role_epoch: int = 0
    tls: bool = False
    kv_events: Endpoints | None = None

    @property
    def exchange(self) -> str:
        """Engines with the same value can exchange KV."""
        return f"{self.kind}/{self.connector}" if self.connector else self.kind

    @property
    def identity(self) -> tuple[object, ...]:
        """Two addresses of one identity are the same engine, whatever role it has now."""
        fixed = (self.name, self.kind, self.connector, self.host, self.port, self.secret_file, self.slot, self.tls)
        return (*fixed, *sorted(self.ports.items()))


# The name of the entry for API keys without one of their own.
EVERY_KEY = "*"


class KeySettings(msgspec.Struct, frozen=True):
    """The settings of one API key. `weight`: its share of the engines, relative to other keys; the limits are 0 for
    none; `streams`: answers at once; `priority`: its class, lower goes first."""

    name: str
    weight: float = 1.0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    streams: int = 0
    priority: int = 0


class ProxyConfig(msgspec.Struct, frozen=True):
    """The proxy's settings, passed in a file of the run directory.

    A reload reads the file again and applies everything except the fields in FIXED. `draining`: engines that get no
    new requests; `moving`: those whose streams go on elsewhere; `lease_s`: how long prefill keeps KV, for kinds that do
    not verify it themselves. `unlinked`: by decode engine, the prefill engines whose KV it cannot read. `swept`: how
    many times an engine was freed of what requests had left there. `accept_nodes`: engines may register themselves,
    with a key of `node_keys`. `takeover`: clients' connections are to outlive the proxy, where that is possible.
    """

    FIXED: ClassVar[tuple[str, ...]] = (
        "service", "model", "max_model_len", "workers", "run_dir", "tls_cert", "tls_key", "cors_origins",
        "otlp_endpoint", "takeover", "accept_nodes",
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
    keys: list[KeySettings] = []
    tls_cert: str = ""
    tls_key: str = ""
    cors_origins: list[str] = []
    access_log: str = ""
    otlp_endpoint: str = ""
    takeover: bool = False
    accept_nodes: bool = False
    node_keys: str = ""
    draining: list[str] = []
    moving: list[str] = []
    unlinked: dict[str, list[str]] = {}
    swept: dict[str, int] = {}
    drain_s: float = 5.0
    lease_s: float = 30.0


class EngineLoad(msgspec.Struct, frozen=True):
    """A proxy's view of one engine: calls in progress, and whether it may get more.

    `left`: tokens of KV that requests have left there and nobody can name; `left_part`: of all that it may have there;
    `sent`: prompts sent to it so far. All 0 for engines that free their KV themselves. `latency`: durations of the last
    answered calls, seconds, oldest first. `speeds`: bytes of prompts and streams per second, 0: unknown; `avoids`:
    prefill engines whose KV it cannot read, or could not lately. `beginnings`: of prompts, of which it has told that it
    has their KV; `blocks`: of KV that it has, by its events.
    """

    calls: int
    usable: bool
    left: int = 0
    left_part: float = 0.0
    sent: int = 0
    latency: tuple[float, ...] = ()
    speeds: tuple[float, float] = (0.0, 0.0)
    avoids: tuple[str, ...] = ()
    beginnings: int = 0
    blocks: int = 0


class PoolReply(msgspec.Struct, frozen=True):
    """A proxy's engines, by name, as /pdctl/v1/pool and /pdctl/v1/reload return them."""

    engines: dict[str, EngineLoad]


class FailedTry(msgspec.Struct, frozen=True):
    """A try of a request that failed. `at_s`: seconds after the request came; `tokens`: those that the client had."""

    at_s: float
    engine: str
    prefill: str
    decode: str
    tokens: int
    reason: str


class RequestPhase(msgspec.Struct, frozen=True):
    """A phase of a request's last try; seconds after the request came."""

    name: str
    begin_s: float
    end_s: float
    engine: str = ""


class RecentRequest(msgspec.Struct, frozen=True):
    """A request that is over. `at`: when it came, seconds since 1970; `moved_s`: when its stream last went on at
    another engine. It has no text."""

    id: str
    path: str
    status: int
    at: float
    seconds: float
    ttft_s: float | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    prefill: str
    decode: str
    phases: tuple[RequestPhase, ...]
    failed: tuple[FailedTry, ...] = ()
    moved_s: float | None = None
    hand_over_bytes: int = 0


class RecentReply(msgspec.Struct, frozen=True):
    """The last requests of a proxy, oldest first."""

    requests: tuple[RecentRequest, ...]


class Counted(msgspec.Struct, frozen=True):
    """A histogram since the start: counts by upper bound in seconds, and the sum of all values. The last count is of
    larger values."""

    bounds: list[float]
    counts: list[int]
    total: float


class Figures(msgspec.Struct, frozen=True):
    """What a proxy has counted since its start. `answered` and `failed`: requests; `waiting`: requests, now."""

    answered: float
    failed: float
    tokens: float
    prompt_tokens: float
    failovers: float
    waiting: int
    ttft: Counted
    itl: Counted


class KeyUse(msgspec.Struct, frozen=True):
    """What one API key has at a proxy now, and had since its start.

    `running` and `waiting`: answers; `refused`: of `requests`, those refused with 429; `cached_tokens`: of
    `prompt_tokens`; `queue_s`: sum of the times that requests waited; `ttft_s`: sum of the times to first token, of
    `first_tokens` requests. `requests_left` and `tokens_left`: what its limits allow now, None without such a limit.
    """

    running: int = 0
    waiting: int = 0
    requests: float = 0.0
    refused: float = 0.0
    prompt_tokens: float = 0.0
    cached_tokens: float = 0.0
    output_tokens: float = 0.0
    queue_s: float = 0.0
    ttft_s: float = 0.0
    first_tokens: float = 0.0
    requests_left: float | None = None
    tokens_left: float | None = None


class KeysReply(msgspec.Struct, frozen=True):
    """The API keys of a proxy, by name, as /pdctl/v1/keys returns them."""

    keys: dict[str, KeyUse]


class KeySpent(msgspec.Struct, frozen=True, array_like=True):
    """What a proxy worker took from the limits of one API key since its start: requests and tokens; its answers now;
    and what of both limits is used and not refilled yet, by all proxies."""

    requests: float
    tokens: float
    streams: float
    requests_level: float
    tokens_level: float


class SourceSpent(msgspec.Struct, frozen=True):
    """What one start of a proxy worker has taken, by key, as it was `age_s` seconds ago."""

    age_s: float
    keys: dict[str, KeySpent]


class SpentNews(msgspec.Struct, frozen=True):
    """What is told to a proxy worker. `elsewhere`: of the proxies of other nodes; `here`: of this node's workers, and
    of their last starts. By the name of a start, which is unique in the cluster."""

    elsewhere: dict[str, SourceSpent]
    here: dict[str, SourceSpent]


class SpentReply(msgspec.Struct, frozen=True):
    """What a proxy worker answers: its epoch, and what it has taken."""

    epoch: str
    keys: dict[str, KeySpent]


class Quarantined(msgspec.Struct, frozen=True):
    """Digests of request bodies that killed engines, with the seconds for which they are refused."""

    bodies: dict[str, float]


# Memory that one client's connection may take in the journal of a proxy, in bytes: a page, 256 KiB of requests, 128 KiB
# of output, 256 KiB of notes.
SLOT_BYTES = 4096 + (256 + 128 + 256) * 1024


def listener_path(run_dir: Path, name: str) -> Path:
    """The socket on which a proxy gives its listening socket back."""
    return run_dir / "ipc" / f"{name}.listen"
