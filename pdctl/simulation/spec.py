"""An imagined service: its engines, what lies between them, and what happens to it."""

from __future__ import annotations

from dataclasses import dataclass, field

from pdctl.latency import StepTimes


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One engine. `times`: how long its steps take, without its `machine`; `blocks`: of KV. `machine`: the name of the
    machine whose cores it shares, "" if it has a processor for itself. The other keys are those of [[engines]]."""

    name: str
    role: str
    times: StepTimes
    blocks: int
    block_size: int = 16
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    max_model_len: int = 2**20
    policy: str = "fcfs"
    inline_prefill: bool = True
    prefix_caching: bool = True
    leased_max: float = 0.75
    machine: str = ""


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """See `machine.Machine`."""

    cores: int
    slowdown: float = 1.0


@dataclass(frozen=True, slots=True)
class TransferSpec:
    """How KV moves. `bandwidth`: bytes per second into one engine; `latency_s`: of one read; `token_bytes`: KV of one
    token; `chunked`: decode reads a prompt's first chunks while prefill computes the rest; `deadline_s`: after so long
    a hand-over is given up."""

    bandwidth: float = 5e9
    latency_s: float = 0.001
    token_bytes: int = 36_864
    chunked: bool = True
    deadline_s: float = 120.0


@dataclass(frozen=True, slots=True)
class Fault:
    """An engine dies at `at_s`, and one in its place is ready `after_s` later."""

    engine: str
    at_s: float
    after_s: float


@dataclass(frozen=True, slots=True)
class Costs:
    """What is not in the steps. `call_s`: from a router's call to its arrival in the engine's scheduler, and of the
    hand-over's commit; `jitter`: standard deviation of the logarithm of a step's time over its prediction."""

    call_s: float = 0.002
    jitter: float = 0.0


@dataclass(frozen=True, slots=True)
class ElasticSpec:
    """Roles that follow the load; the keys of [elastic]."""

    min_prefill: int = 1
    min_decode: int = 1
    interval_s: float = 2.0
    cooldown_s: float = 30.0


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """A whole service. `machines`: by name. `elastic`: None: the roles stay. The other keys are those of [proxy] and
    [slo]."""

    engines: tuple[EngineSpec, ...]
    ttft_s: float = 2.0
    tpot_s: float = 0.2
    routing: str = "min_expected_latency"
    admission: str = "queue"
    max_queue: int = 256
    transfer: TransferSpec = TransferSpec()
    machines: dict[str, MachineSpec] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()
    costs: Costs = Costs()
    elastic: ElasticSpec | None = None


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of the load. `at`: seconds; `inputs` and `outputs`: tokens; `prompt`: token ids, if prompts may begin
    alike; `key`: of the API."""

    at: float
    inputs: int
    outputs: int
    prompt: tuple[int, ...] = ()
    key: str = "-"
