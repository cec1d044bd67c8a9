"""What the user asked for: frozen dataclasses, no defaults for what the loader must decide."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    """The service as a whole. `max_model_len` is in tokens, prompt and output together; `engine_ports`: first and last
    port that engines may listen on, or none for pdctl's own range."""

    name: str
    model: str
    served_model_name: str
    max_model_len: int
    engine_ports: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Proxy:
    """The one address clients know. Paths are absolute, or "" for none; `max_queue` in requests.

    `admission`: "queue" waits for seats at the engines, "slo" also refuses what would miss the targets.
    `unknown_fields`: "warn" leaves out fields of requests that no engine knows and says so, "refuse" answers 400.
    """

    host: str
    port: int
    routing: str
    cpus: tuple[int, ...]
    workers: int
    admission: str
    max_queue: int
    max_body_mb: float
    unknown_fields: str
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
class Expect:
    """What RDMA ports should be; `pdctl doctor` compares. 0, "any" and -1: nothing in particular."""

    rate_gbps: float = 0.0
    link_layer: str = "any"
    mtu: int = 0
    gid_index: int = -1


@dataclass(frozen=True, slots=True)
class EngineGroup:
    """`replicas` engines alike. `gpus` are indices as the driver counts them, UUIDs or their beginnings, or MIG slices;
    empty means choose.

    `url`: it runs somewhere already, and is used without being started; `secret_file` holds what it wants as bearer.
    `ready`: what readiness is, "" for the kind's own probe; `restart_with`: groups whose exit restarts this one; `env`:
    on top of ours.
    """

    name: str
    role: Role
    kind: str
    replicas: int
    device: Device
    gpus: tuple[int | str, ...]
    share_gpu: bool
    open: bool
    cpus: tuple[int, ...]
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_gb: float
    block_size: int
    url: str = ""
    secret_file: str = ""
    ready: str = ""
    restart_with: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()

    @property
    def is_attached(self) -> bool:
        """Whether it is somebody else's process."""
        return bool(self.url)

    def replica_names(self) -> tuple[str, ...]:
        """`prefill-0`, `prefill-1` ...; an attached engine is one, and has its own name."""
        return (self.name,) if self.url else tuple(f"{self.name}-{i}" for i in range(self.replicas))


@dataclass(frozen=True, slots=True)
class Supervision:
    """How processes are watched and ended. Seconds throughout; 0 turns a probe off.

    `stop_signals`, each with `grace_s` to take effect, come before SIGKILL. `drain_s`: how long running requests may
    take before a stop that drains. `startup_s`: until ready. `stable_s`: ready for so long, and earlier crashes do not
    delay the next restart. `liveness_s`: between probes, of which `liveness_failures` in a row are a death.
    `progress_s`: running requests without a token for so long are a hang. `functional_s`: between one-token requests to
    an idle engine. `on_supervisor_death`: what engines do when we are killed. `log_mb`: size of each process's log.
    """

    grace_s: float
    stop_signals: tuple[str, ...]
    drain_s: float
    max_restarts: int
    within_s: float
    startup_s: float
    stable_s: float
    liveness_s: float
    liveness_failures: int
    progress_s: float
    functional_s: float
    on_supervisor_death: str
    log_mb: float


@dataclass(frozen=True, slots=True)
class Topology:
    """One service. `source` is the file it came from, or a name for the built-in default; `text`: what stood there."""

    service: Service
    proxy: Proxy
    slo: Slo
    transfer: Transfer
    engines: tuple[EngineGroup, ...]
    supervision: Supervision
    source: str | None
    text: str = ""
    expect: Expect = field(default_factory=Expect)
