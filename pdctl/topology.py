"""What the user asked for: frozen dataclasses, no defaults for what the loader must decide."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What an engine accepts: prefills, hand-overs to decode, or both."""

    PREFILL = "prefill"
    DECODE = "decode"
    HYBRID = "hybrid"


class Device(StrEnum):
    """Where an engine computes."""

    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True)
class Service:
    """The service as a whole. `max_model_len` is in tokens, prompt and output together."""

    name: str
    model: str
    served_model_name: str
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Proxy:
    """The one address clients know. Paths are absolute, or "" for none; `max_queue` in requests.

    `admission`: "queue" waits for seats at the engines, "slo" also refuses what would miss the targets.
    """

    host: str
    port: int
    routing: str
    cpus: tuple[int, ...]
    workers: int
    admission: str
    max_queue: int
    max_body_mb: float
    api_keys: str
    tls_cert: str
    tls_key: str
    cors_origins: tuple[str, ...]
    access_log: str
    otlp_endpoint: str


@dataclass(frozen=True, slots=True)
class Slo:
    """Targets in milliseconds that the proxy counts attainment against."""

    ttft_ms: float
    tpot_ms: float


@dataclass(frozen=True, slots=True)
class Transfer:
    """How KV moves.

    `lease_s`: seconds a hand-over may stay without sign of life before its blocks are freed. `read_s`: seconds after
    which a read is given up, besides the time its bytes need. `leased_max`: part of a pool that may be held for peers.
    `chunked`: decode reads a prompt's first chunks while prefill computes the last. `ports`: first and last, or none.
    """

    backend: str
    protocol: str
    devices: tuple[str, ...]
    ports: tuple[int, ...]
    lease_s: float
    read_s: float
    leased_max: float
    chunked: bool


@dataclass(frozen=True, slots=True)
class EngineGroup:
    """`replicas` engines alike. `gpus` are indices as the driver counts them; empty means choose.

    `url`: it runs somewhere already, and is used without being started; `secret_file` holds what it wants as bearer.
    """

    name: str
    role: Role
    kind: str
    replicas: int
    device: Device
    gpus: tuple[int, ...]
    share_gpu: bool
    cpus: tuple[int, ...]
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_gb: float
    block_size: int
    url: str = ""
    secret_file: str = ""

    @property
    def is_attached(self) -> bool:
        """Whether it is somebody else's process."""
        return bool(self.url)

    def replica_names(self) -> tuple[str, ...]:
        """`prefill-0`, `prefill-1` ...; an attached engine is one, and has its own name."""
        return (self.name,) if self.url else tuple(f"{self.name}-{i}" for i in range(self.replicas))


@dataclass(frozen=True, slots=True)
class Supervision:
    """`grace_s`: seconds between TERM and KILL."""

    grace_s: float
    max_restarts: int
    within_s: float


@dataclass(frozen=True, slots=True)
class Topology:
    """One service. `source` is the file it came from, or None for the built-in default."""

    service: Service
    proxy: Proxy
    slo: Slo
    transfer: Transfer
    engines: tuple[EngineGroup, ...]
    supervision: Supervision
    source: str | None
