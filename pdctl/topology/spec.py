"""The user's topology as frozen dataclasses, without defaults for values that the loader must decide."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase

from pdctl.speculative import Speculative


class Role(StrEnum):
    """The work that an engine accepts: prefills, hand-overs to decode, or both."""

    PREFILL = "prefill"
    DECODE = "decode"
    HYBRID = "hybrid"


ENGINE_ROLES = frozenset(role.value for role in Role)


class Device(StrEnum):
    """The device that an engine computes on."""

    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True)
class Service:
    """The service. `max_model_len` is in tokens, prompt and output together. `engine_ports`: first and last port that
    engines may listen on; empty for pdctl's default range. `tool_parser` and `reasoning_parser`: how builtin engines
    find tool calls and reasoning in outputs, "auto" by the chat template."""

    name: str
    model: str
    served_model_name: str
    max_model_len: int
    engine_ports: tuple[int, ...] = ()
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """The settings of the API key of this name, or of every key without an entry ("*"). `weight`: its share of the
    engines, relative to other keys. Limits are 0 for none; `streams`: answers at once. `priority`: its class, lower
    goes first."""

    name: str
    weight: float = 1.0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    streams: int = 0
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Proxy:
    """The proxy, the one address that clients use. Paths are absolute, or "" for none; `max_queue` is in requests.

    `admission`: "queue" queues requests until an engine has room, "slo" also refuses requests that would miss the
    targets. `unknown_fields`: "warn" drops request fields that no engine knows and reports them, "refuse" answers 400.
    `accept_nodes`: LMDeploy's engines may register themselves, with one of the keys in `node_keys`; those that have not
    answered for `node_away_s` seconds are forgotten. `nodes`: of a cluster, those with a proxy;
    empty: all. `takeover`: clients' connections outlive the proxy, `takeover_slots` of each proxy process. `keys`: the
    settings of keys in `api_keys`.
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
    accept_nodes: bool = False
    node_keys: str = ""
    node_away_s: float = 90.0
    nodes: tuple[str, ...] = ()
    takeover: bool = False
    takeover_slots: int = 512
    keys: tuple[ApiKey, ...] = ()

    @property
    def slots(self) -> int:
        """Connections of each proxy process that outlive it. TLS ends in the proxy, and what is written for pages of
        other origins passes a middleware: these are not covered."""
        return 0 if self.tls_cert or self.cors_origins or not self.takeover else self.takeover_slots


@dataclass(frozen=True, slots=True)
class Elastic:
    """Roles that follow the load. `mode`: "advise" only says what it would do. `min_prefill`, `min_decode`: engines
    that keep such a role at least; `interval_s`: between two looks; `cooldown_s`: an engine rests after a change."""

    mode: str = "off"
    min_prefill: int = 1
    min_decode: int = 1
    interval_s: float = 2.0
    cooldown_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Dashboard:
    """The live page. `listen`: its loopback address, "" if it opens only when somebody asks for it."""

    listen: str = ""


@dataclass(frozen=True, slots=True)
class Cluster:
    """The cluster that a service runs in. `etcd`: addresses of its members. `interface`: what a node listens on: the
    name of an interface, an address, or a network such as 10.0.0.0/24. `certificates`: the folder with the node's
    certificate, "" for none; `agent_port`: of agents, for each other. Paths are absolute.

    `ttl_s`: a node that is silent for so many seconds is unknown; `node_lost_s`: its engines are placed elsewhere after
    so many; `spare_nodes`: so many nodes may fail, and the rest must have room. `cells`: see
    `cell_of`. `ssh_nodes`: hosts as ssh knows them, on which it starts agents. `ray_address`: of Ray's head, "" for the
    Ray that this machine is a node of; `ray_allow_commands`: of the agents that Ray starts.
    """

    etcd: tuple[str, ...]
    interface: str
    secret_file: str
    certificates: str = ""
    etcd_user: str = ""
    etcd_password_file: str = ""
    launcher: str = "none"
    agent_port: int = 18090
    ttl_s: int = 5
    node_lost_s: float = 60.0
    spare_nodes: int = 0
    cells: tuple[str, ...] = ()
    ssh_nodes: tuple[str, ...] = ()
    ray_address: str = ""
    ray_token_file: str = ""
    ray_allow_commands: bool = False

    def cell_of(self, node: str) -> str:
        """The cell of a node: the first of `cells`, patterns of names, that its name matches, else "-"; "" if there are
        none. Engines exchange KV, and proxies use engines, inside a cell only."""
        if not self.cells:
            return ""
        return next((pattern for pattern in self.cells if fnmatchcase(node, pattern)), "-")


@dataclass(frozen=True, slots=True)
class Slo:
    """Latency targets in milliseconds. The proxy counts the requests that meet them."""

    ttft_ms: float
    tpot_ms: float


@dataclass(frozen=True, slots=True)
class Transfer:
    """How KV moves between engines.

    `lease_s`: seconds without a renewal after which a hand-over's blocks are freed. `read_s`: seconds after which a
    read is given up, in addition to the time that its bytes need. `leased_max`: largest fraction of a pool that leases
    may hold. `chunked`: decode reads a prompt's first chunks while prefill computes the rest. `ports`: first and last,
    or empty.
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
    """Expected properties of RDMA ports, checked by `pdctl doctor`. 0, "any" and -1 mean no expectation."""

    rate_gbps: float = 0.0
    link_layer: str = "any"
    mtu: int = 0
    gid_index: int = -1


# Of a GPU that an engine has for itself. vLLM's default, too.
_KV_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class EngineGroup:
    """A group of `replicas` identical engines. `gpus` are driver indices, UUIDs or prefixes of them, or MIG slices. If
    it is empty, pdctl chooses.

    `url`: address of an engine that is already running; pdctl uses it but does not start it. `secret_file`: file with
    its bearer token. `ready`: readiness probe, "" for the kind's default. `restart_with`: when one of these groups
    exits, this one is restarted too. `env`: added to pdctl's environment.

    `prefix_caching`: keep KV for prompts with the same beginning. `deterministic`: KV that is found has the bits of KV
    that is computed. `prefix_quota`: the part of what is kept that one API key may have while others need the room.
    `kv_offload_gb`: GiB of host memory for KV that the pool has no room for.
    `kv_events`: what is published of it. `policy`: the order in which prompts are computed.
    `inline_prefill`: a decode engine takes whole requests, too, and sequences that decode keep their target.
    `attention`: how attention is computed. `enforce_eager`: no CUDA graphs. `schedule_ahead`: whether
    the next step is scheduled while one computes, a word of SCHEDULE_AHEAD. `speculative`: how next tokens are guessed,
    None: not at all. `fetch_prefixes`: whether KV of a prompt's beginning is fetched from another engine, a word of
    FETCH_PREFIXES.

    `python`: the interpreter of the environment that has the engine, "" for pdctl's own. `args`: added to the engine's
    command line. `gpu_memory_utilization`: 0.0 for the engine's default. `connector`: how engines of this kind exchange
    KV, "" for the kind's default; `store`: the store that it uses, "" for none. `depends_on`: groups, processes and
    stores that must be ready before its first start. `process`: the entry of [[processes]] that is this engine, instead
    of a `url`. `nodes`: of a cluster, those that its engines may run on; empty: any. `numbers`: of the
    replicas that one node has; empty: all. `given`: the keys that the file
    sets; the others have pdctl's defaults.
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
    prefix_caching: bool = True
    deterministic: bool = False
    prefix_quota: float = 1.0
    kv_offload_gb: float = 0.0
    kv_events: str = "off"
    policy: str = "fcfs"
    inline_prefill: bool = True
    attention: str = "auto"
    enforce_eager: bool = False
    schedule_ahead: str = "auto"
    fetch_prefixes: str = "false"
    speculative: Speculative | None = None
    url: str = ""
    secret_file: str = ""
    bootstrap_port: int = 0
    ready: str = ""
    restart_with: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    python: str = ""
    args: tuple[str, ...] = ()
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    sequence_parallel: int = 1
    dtype: str = "auto"
    quantization: str = ""
    gpu_memory_utilization: float = 0.0
    connector: str = ""
    store: str = ""
    depends_on: tuple[str, ...] = ()
    process: str = ""
    nodes: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()
    given: frozenset[str] = frozenset()

    @property
    def gpus_per_replica(self) -> int:
        """The number of GPUs that one engine of the group uses."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel * self.sequence_parallel

    @property
    def kv_share(self) -> float:
        """Of builtin engines: the fraction of a GPU's memory that the engine fills with KV; 0.0 if `kv_cache_gb` is the
        size of its KV, as on CPUs, and on shared GPUs unless the file says otherwise."""
        if self.device is Device.CPU or "kv_cache_gb" in self.given:
            return 0.0
        return self.gpu_memory_utilization or (0.0 if self.share_gpu else _KV_SHARE)

    @property
    def is_attached(self) -> bool:
        """Whether the proxy uses it by its address only: pdctl did not start it, or not as an engine."""
        return bool(self.url or self.process)

    def replica_names(self) -> tuple[str, ...]:
        """Process names: `prefill-0`, `prefill-1` and so on. An attached engine is one process with the group's
        name."""
        if self.is_attached:
            return (self.name,)
        return tuple(f"{self.name}-{number}" for number in self.numbers or range(self.replicas))


@dataclass(frozen=True, slots=True)
class Command:
    """Any program as a process of the service. `{port}` in `command` and `env` stands for its first port, and
    `{port:PURPOSE}` for the port of that purpose.

    `ports`: purpose and number of each port; number 0: pdctl chooses. `ready` and `alive`: probes; `alive` is "none" if
    only its exit counts. `gpus`, `share_gpu`, `cpus`, `env`, `restart_with`, `depends_on`: see EngineGroup.
    """

    name: str
    command: tuple[str, ...]
    ports: tuple[tuple[str, int], ...]
    ready: str
    alive: str
    gpus: tuple[int | str, ...]
    share_gpu: bool
    cpus: tuple[int, ...]
    env: tuple[tuple[str, str], ...]
    depends_on: tuple[str, ...]
    restart_with: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Store:
    """A KV store: a server that engines put blocks into and get them from. `python`: the interpreter of the environment
    that has it, "" for pdctl's own. `args`: added to its command line.

    `data_dir`: the folder in which it keeps blocks on disk, "" for none. `segment_gb`: GiB of memory that each engine
    adds to it; `buffer_gb`: GiB of memory that each engine copies through. `metadata`: "p2p" if engines find each other
    through the server itself, "http" if it also serves their addresses by HTTP. `chunk_tokens`: tokens per object.
    """

    name: str
    kind: str
    python: str
    args: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    cpus: tuple[int, ...]
    data_dir: str
    segment_gb: float
    buffer_gb: float
    metadata: str
    chunk_tokens: int
    given: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Supervision:
    """How processes are watched and stopped. All times are in seconds; 0 turns a probe off.

    `stop_signals` are sent in turn, each followed by a grace period of `grace_s`; then comes SIGKILL. `drain_s`: limit
    for running requests to finish when draining. `startup_s`: limit until ready. `stable_s`: after being ready this
    long, earlier crashes no longer delay a restart. `liveness_s`: interval of liveness probes; `liveness_failures`
    consecutive failures mean that the process is dead. `progress_s`: an engine hangs if it runs requests but produces
    no token for this long. `functional_s`: interval of one-token requests to an idle engine. `on_supervisor_death`:
    what engines do when the supervisor is killed. `log_mb`: size limit of each process's log."""

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
    """One service. `source`: the file it came from, or a name for the built-in default; `text`: the file's content.
    `elsewhere`: of one node's part of it, the groups that other nodes run."""

    service: Service
    proxy: Proxy
    slo: Slo
    transfer: Transfer
    engines: tuple[EngineGroup, ...]
    supervision: Supervision
    source: str | None
    text: str = ""
    expect: Expect = field(default_factory=Expect)
    processes: tuple[Command, ...] = ()
    stores: tuple[Store, ...] = ()
    elastic: Elastic = field(default_factory=Elastic)
    dashboard: Dashboard = field(default_factory=Dashboard)
    cluster: Cluster | None = None
    elsewhere: tuple[EngineGroup, ...] = ()

    @property
    def all_engines(self) -> tuple[EngineGroup, ...]:
        """All groups of the service: those of other nodes, too."""
        return (*self.engines, *self.elsewhere)

    def members(self, name: str) -> tuple[str, ...]:
        """The processes of a group, a process or a store of this name; empty if there is none."""
        if name in {*(entry.name for entry in self.processes), *(store.name for store in self.stores)}:
            return (name,)
        groups = (group for group in self.engines if group.name == name and not group.is_attached)
        return tuple(process for group in groups for process in group.replica_names())
