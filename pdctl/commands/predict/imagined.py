"""The imagined service of a verb: its options, and what they add up to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pdctl.commands.bench.load import Traffic, Workload
from pdctl.commands.common import FILE_ENV, topology_file
from pdctl.errors import PdctlError

if TYPE_CHECKING:
    from pdctl.simulation.engines.fleets import Memory
    from pdctl.simulation.engines.profiles import Speed
    from pdctl.simulation.spec import Arrival, ServiceSpec
    from pdctl.topology.spec import Topology

# Ids to make prompts of; which ones does not matter.
_IDS = tuple(range(1, 1000))


@dataclass(frozen=True, slots=True)
class Imagined:
    """What is imagined around the engines. Its fields become options of verbs that `takes` it."""

    file: Annotated[
        Path | None,
        typer.Option(
            "-f", "--file", envvar=FILE_ENV,
            help="Topology of the imagined service. Default: ./pdctl.toml, else a built-in topology.",
        ),
    ] = None  # fmt: skip
    profile: Annotated[
        Path | None,
        typer.Option(
            "--profile",
            help="How fast the engines are: a file of `bench profile --out`, of the cache, or with coefficients. "
            "Default: what an engine has measured here with the topology's model.",
        ),
    ] = None
    kv_gb: Annotated[
        float | None, typer.Option("--kv-gb", help="GiB of KV of each engine. Default: as in the topology.")
    ] = None
    kv_token_bytes: Annotated[
        int, typer.Option("--kv-token-bytes", min=0, help="Bytes of KV per token. Default: those of the model.")
    ] = 0
    bandwidth: Annotated[
        float, typer.Option("--bandwidth", min=0.001, help="GB/s with which an engine reads KV from another.")
    ] = 10.0
    latency_ms: Annotated[float, typer.Option("--latency-ms", min=0.0, help="Latency of such a read.")] = 1.0
    call_ms: Annotated[
        float, typer.Option("--call-ms", min=0.0, help="Time from the proxy's call to the engine's queue.")
    ] = 3.0
    jitter: Annotated[
        float,
        typer.Option(
            "--jitter", min=0.0, max=2.0, help="Spread of a step's time: standard deviation of its logarithm."
        ),
    ] = 0.1
    cores: Annotated[
        int, typer.Option("--cores", min=0, help="Cores that engines on CPUs share. Default: those of this machine.")
    ] = 0
    slowdown: Annotated[
        float,
        typer.Option("--slowdown", min=1.0, help="How many times as long a step takes while all these cores compute."),
    ] = 1.0
    max_num_batched_tokens: Annotated[
        int, typer.Option("--chunk", min=0, help="Tokens per step of all engines. Default: as in the topology.")
    ] = 0
    policy: Annotated[
        str, typer.Option("--policy", help="Order of prompts in all engines. Default: as in the topology.")
    ] = ""
    kill: Annotated[
        list[str],
        typer.Option("--kill", help="ENGINE:AT:AFTER: killed after AT seconds, ready again AFTER seconds later."),
    ] = field(default_factory=list)

    def topology(self) -> Topology:
        """The topology. Raises PdctlError."""
        from pdctl.topology.loader import load_imagined, load_text

        path = topology_file(self.file)
        if path is not None:
            return load_imagined(path)
        from pdctl.commands.setup.default import default_text
        from pdctl.host import read_host

        host = read_host()
        return load_text(default_text(host), "the built-in default", host)

    def speed(self, topology: Topology) -> Speed:
        """How fast an engine is. Raises PdctlError."""
        from pdctl.simulation.engines.profiles import own_speed, read_speed

        if self.profile is not None:
            return read_speed(self.profile)
        from pdctl.host.users import cache_root

        model = _model_folder(topology)
        if model is None:
            raise PdctlError(f"the model {topology.service.model} is not on this machine", "give --profile FILE")
        return own_speed(cache_root(), model)

    def memory(self, topology: Topology, speed: Speed) -> Memory:
        """How much KV there is. Raises PdctlError."""
        from pdctl.host.models import read_shape
        from pdctl.simulation.engines.fleets import Memory

        token_bytes = self.kv_token_bytes
        if not token_bytes:
            model = _model_folder(topology)
            shape = None if model is None else read_shape(model)
            if shape is None:
                raise PdctlError(
                    f"the model {topology.service.model} is not on this machine",
                    "give --kv-token-bytes, such as 131072",
                )
            # The shape counts two bytes per number.
            token_bytes = shape.kv_token_bytes * (2 if _dtype(topology, speed) == "float32" else 1)
        return Memory(token_bytes, self.kv_gb)

    def service(self, topology: Topology, speed: Speed) -> ServiceSpec:
        """The whole service. Raises PdctlError."""
        import os

        from pdctl.names.policies import POLICY_NAMES
        from pdctl.simulation.engines.fleets import of_topology, parse_fault
        from pdctl.simulation.spec import Costs

        if self.policy and self.policy not in POLICY_NAMES:
            raise PdctlError(f"--policy {self.policy!r} is not a policy", f"policies: {', '.join(POLICY_NAMES)}")
        cores = self.cores or len(os.sched_getaffinity(0))
        found = of_topology(topology, speed, self.memory(topology, speed), cores, self.slowdown)
        transfer = replace(found.transfer, bandwidth=self.bandwidth * 1e9, latency_s=self.latency_ms / 1000)
        engines = tuple(
            replace(
                engine, policy=self.policy or engine.policy,
                max_num_batched_tokens=self.max_num_batched_tokens or engine.max_num_batched_tokens,
            )
            for engine in found.engines
        )  # fmt: skip
        return replace(
            found, engines=engines, transfer=transfer, costs=Costs(self.call_ms / 1000, self.jitter),
            faults=tuple(map(parse_fault, self.kill)),
        )  # fmt: skip


def _dtype(topology: Topology, speed: Speed) -> str:
    """The engines' number type: the topology's, else that of the engine that measured its speed, else the device's."""
    from pdctl.topology.spec import Device

    group = topology.engines[0]
    if group.dtype != "auto":
        return group.dtype
    return speed.dtype or ("float32" if group.device is Device.CPU else "bfloat16")


def _model_folder(topology: Topology) -> Path | None:
    from pdctl.host.models import UnknownModel, locate_model
    from pdctl.host.users import cache_root

    base = Path(topology.source).parent if topology.source else Path()
    try:
        found = locate_model(topology.service.model, cache_root(), base)
    except UnknownModel as failure:
        raise PdctlError(str(failure)) from None
    return Path(found.path) if found.ready else None


def traffic_of(traffic: Traffic, trace: Path | None) -> Traffic:
    """The traffic; `trace`: a short way to say that it is one. Raises PdctlError."""
    if trace is None:
        return traffic
    if traffic.path is not None:
        raise PdctlError("--trace and --data are the same", "leave one of them out")
    return replace(traffic, workload=Workload.TRACE, path=trace)


def arrivals(traffic: Traffic) -> tuple[list[Arrival], list[Arrival]]:
    """The requests that the same options send to a real service, and those of its warm-up. Raises PdctlError."""
    from pdctl.bench.workload import Vocabulary
    from pdctl.simulation.spec import Arrival

    asked, times = traffic.requests(Vocabulary(_IDS))
    # Prompts that have nothing in common need no content. What warms up is sent again.
    alike = traffic.workload in (Workload.SHARED_PREFIX, Workload.FILE) or traffic.warm_up or _begins_alike(traffic)
    found = []
    for request, at in zip(asked, times, strict=True):
        prompt = _tokens(request.prompt)
        found.append(Arrival(at, len(prompt), request.max_tokens, prompt if alike else ()))
    first = (found * (traffic.warm_up // len(found) + 1))[: traffic.warm_up]
    return sorted(found, key=lambda arrival: arrival.at), first


def _begins_alike(traffic: Traffic) -> bool:
    """Whether a trace tells which prompts begin alike."""
    from pdctl.bench.workload import read_lines

    if traffic.workload is not Workload.TRACE or traffic.path is None:
        return False
    lines = read_lines(traffic.path)
    return bool(lines) and lines[0].lstrip().startswith("{")


def _tokens(prompt: list[int] | str) -> tuple[int, ...]:
    """Token ids. Of a text: one for four bytes, equal for equal texts."""
    if isinstance(prompt, list):
        return tuple(prompt)
    data = prompt.encode()
    return tuple(int.from_bytes(data[at : at + 4]) for at in range(0, len(data), 4)) or (0,)
