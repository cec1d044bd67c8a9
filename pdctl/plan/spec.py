"""The plan as frozen dataclasses: the processes of a service with everything that is needed to start them."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field

from pdctl.kv_events import Endpoints
from pdctl.net import LOOPBACK
from pdctl.topology.spec import ENGINE_ROLES, Dashboard, Elastic, Proxy, Supervision

# Roles of processes that are not engines.
PROXY, STORE, COMMAND = "proxy", "store", "command"


@dataclass(frozen=True, slots=True)
class Probe:
    """How to check that a process is ready and alive. All times are in seconds.

    `ready`: tcp:HOST:PORT, http://..., log:PATTERN, or "" for ready at once. `alive`: tcp:HOST:PORT or http://... to
    probe from then on, or "".
    `state`: URL of an engine's counts of running requests and tokens, or "". `generate`: URL that generates one token
    for a POST of `generate_body`; with `ready_generates`, the process is ready only once it has done so.
    """

    ready: str
    alive: str
    state: str
    generate: str
    interval_s: float
    timeout_s: float
    startup_s: float
    generate_body: str = ""
    ready_generates: bool = False


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process to start. `env` is added to the supervisor's environment; `listen`: the socket that the supervisor
    binds and passes to the process.

    `host`: the address at which other processes reach its `ports`.
    `restart_with`: processes that, when they exit, restart this one too; `why`: the reason for each choice, by field.
    `api_key_env`: the variable in which the process gets the run's secret as its API key, "" for none. `connector`: how
    an engine exchanges KV. `files`: files that must exist before the start, content by path. `inline`: as a
    decode engine it also takes whole requests. `switches`: its role can change while it runs. `planned_role`: its role
    in the topology, if it has another one now; `role_epoch`: counts the changes. `tls`: its ports want certificates of
    the cluster. `slots`: connections of clients that outlive a proxy. `version`: of pdctl, for its own engines and
    proxies. `fetches`: beginnings of prompts from other engines. `kv_events`: where an engine publishes which blocks it
    has.
    """

    name: str
    kind: str
    role: str
    argv: tuple[str, ...]
    env: dict[str, str] = field(hash=False)
    device: str
    cpus: tuple[int, ...]
    gpus: tuple[str, ...]
    ports: dict[str, int] = field(hash=False)
    depends_on: tuple[str, ...]
    probe: Probe
    listen: tuple[str, int] | None
    group: str = ""
    restart_with: tuple[str, ...] = ()
    rdma: tuple[str, ...] = ()
    why: dict[str, str] = field(default_factory=dict, hash=False)
    host: str = LOOPBACK
    api_key_env: str = ""
    connector: str = ""
    files: dict[str, str] = field(default_factory=dict, hash=False)
    inline: bool = False
    switches: bool = False
    planned_role: str = ""
    role_epoch: int = 0
    tls: bool = False
    slots: int = 0
    version: str = ""
    fetches: bool = False
    kv_events: Endpoints | None = None

    @property
    def is_engine(self) -> bool:
        """Whether it computes requests: it has a role, the proxy calls it, and it may hold KV."""
        return self.role in ENGINE_ROLES

    @property
    def is_proxy(self) -> bool:
        """Whether it is one of the service's proxies."""
        return self.role == PROXY

    @property
    def is_ours(self) -> bool:
        """Whether it gets the run's secret, with which the service's own processes call each other."""
        return self.is_engine or self.is_proxy

    def digest(self) -> str:
        """Hash of everything that cannot change while the process runs. Specs with equal digests need no restart."""
        ports = sorted(self.ports.items())
        env = (*sorted(self.env.items()), self.api_key_env, *sorted(self.files.items()))
        role = "" if self.switches else self.role
        fixed = (self.argv, env, role, self.cpus, self.gpus, ports, self.listen, self.version)
        return hashlib.blake2b(repr(fixed).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class Attached:
    """An engine that is already running, here or on another host. pdctl uses it but does not start it. `ports`: those
    beside its API, by purpose; `connector`: how it exchanges KV."""

    name: str
    role: str
    kind: str
    host: str
    port: int
    secret_file: str
    ports: dict[str, int] = field(default_factory=dict, hash=False)
    connector: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that `pdctl up` starts, and where. `node`: of a cluster, the node that starts it; `certificates`: the
    folder of its certificate, "" for none."""

    service: str
    model: str
    model_path: str
    model_ready: bool
    served_model_name: str
    max_model_len: int
    proxy: Proxy
    ttft_ms: float
    tpot_ms: float
    proxy_url: str
    run_dir: str
    log_dir: str
    supervision: Supervision
    processes: tuple[ProcessSpec, ...]
    attached: tuple[Attached, ...]
    source: str = ""
    text: str = ""
    lease_s: float = 30.0
    elastic: Elastic = field(default_factory=Elastic)
    dashboard: Dashboard = field(default_factory=Dashboard)
    node: str = ""
    certificates: str = ""

    def to_dict(self) -> dict[str, object]:
        """The plan for `--json` and for a detached supervisor."""
        return asdict(self)
