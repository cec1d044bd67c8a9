"""Builds a Topology from checked values, with defaults for missing ones."""

from __future__ import annotations

from pathlib import Path

import msgspec

from pdctl.adapters import can_launch, launcher
from pdctl.speculative import Speculative
from pdctl.topology.document import Table
from pdctl.topology.schema import API_KEY, COMMAND, ENGINE, STORE, TABLES, Key
from pdctl.topology.spec import (
    ApiKey,
    Cluster,
    Command,
    Dashboard,
    Device,
    Elastic,
    EngineGroup,
    Expect,
    Proxy,
    Role,
    Service,
    Slo,
    Store,
    Supervision,
    Topology,
    Transfer,
)


def build(data: Table, source: str | None) -> Topology:
    """Build the Topology. `data` must have passed `key_problems`; `source` is the file it came from."""
    service = _filled(data.get("service", {}), TABLES["service"])
    proxy = _filled(data.get("proxy", {}), TABLES["proxy"])
    slo = _filled(data.get("slo", {}), TABLES["slo"])
    transfer = _filled(data.get("transfer", {}), TABLES["transfer"])
    supervision = _filled(data.get("supervisor", {}), TABLES["supervisor"])
    if "cluster" in data and "on_supervisor_death" not in data.get("supervisor", {}):
        # An agent that was killed is started again, by systemd or Ray, and takes its engines over.
        supervision["on_supervisor_death"] = "survive"
    served = service["served_model_name"] or _last_part(service["model"])
    expect = _filled(data.get("expect", {}), TABLES["expect"])
    elastic = _filled(data.get("elastic", {}), TABLES["elastic"])
    return Topology(
        service=Service(
            service["name"],
            service["model"],
            served,
            service["max_model_len"],
            tuple(service["engine_ports"]),
            service["tool_parser"],
            service["reasoning_parser"],
        ),
        proxy=_proxy(proxy, source, tuple(_key(entry) for entry in data.get("keys", ()))),
        slo=Slo(float(slo["ttft_ms"]), float(slo["tpot_ms"])),
        transfer=_transfer(transfer),
        engines=tuple(_group(entry, source) for entry in data.get("engines", ())),
        supervision=_supervision(supervision),
        source=source,
        expect=Expect(float(expect["rate_gbps"]), expect["link_layer"], expect["mtu"], expect["gid_index"]),
        processes=tuple(_command(entry, source) for entry in data.get("processes", ())),
        stores=tuple(_store(entry, source) for entry in data.get("stores", ())),
        elastic=Elastic(
            elastic["mode"],
            elastic["min_prefill"],
            elastic["min_decode"],
            float(elastic["interval_s"]),
            float(elastic["cooldown_s"]),
        ),
        dashboard=Dashboard(**_filled(data.get("dashboard", {}), TABLES["dashboard"])),
        cluster=_cluster(data["cluster"], source) if "cluster" in data else None,
    )


def _cluster(table: Table, source: str | None) -> Cluster:
    values = _filled(table, TABLES["cluster"])
    named = ("secret_file", "certificates", "etcd_password_file", "ray_token_file")
    paths = {name: absolute(values[name], source) for name in named}
    words = {name: values[name] or "" for name in ("etcd_user", "ray_address")}
    given = {
        "etcd": tuple(values["etcd"]),
        "ssh_nodes": tuple(values["ssh_nodes"]),
        "cells": tuple(values["cells"]),
        **words,
        **paths,
    }
    return Cluster(**{**values, **given, "node_lost_s": float(values["node_lost_s"])})


def _supervision(values: Table) -> Supervision:
    # All numbers are floats, because TOML users write whole seconds as integers; only the two counts stay integers.
    found: Table = {name: float(value) if isinstance(value, int) else value for name, value in values.items()}
    for name in ("max_restarts", "liveness_failures"):
        found[name] = values[name]
    return Supervision(**{**found, "stop_signals": tuple(values["stop_signals"])})


def _proxy(values: Table, source: str | None, keys: tuple[ApiKey, ...]) -> Proxy:
    return Proxy(
        host=values["host"],
        port=values["port"],
        routing=values["routing"],
        cpus=tuple(values["cpus"]),
        workers=values["workers"],
        admission=values["admission"],
        max_queue=values["max_queue"],
        max_body_mb=float(values["max_body_mb"]),
        unknown_fields=values["unknown_fields"],
        api_keys=absolute(values["api_keys"], source),
        tls_cert=absolute(values["tls_cert"], source),
        tls_key=absolute(values["tls_key"], source),
        cors_origins=tuple(values["cors_origins"]),
        access_log=absolute(values["access_log"], source),
        otlp_endpoint=values["otlp_endpoint"] or "",
        accept_nodes=values["accept_nodes"],
        node_keys=absolute(values["node_keys"], source),
        node_away_s=float(values["node_away_s"]),
        nodes=tuple(values["nodes"]),
        takeover=values["takeover"],
        takeover_slots=values["takeover_slots"],
        keys=keys,
    )


def _key(entry: Table) -> ApiKey:
    values = _filled(entry, API_KEY)
    return ApiKey(**{**values, "weight": float(values["weight"])})


def absolute(path: str | None, source: str | None) -> str:
    """A path made absolute, relative to the topology file's folder; "" for none."""
    if not path:
        return ""
    return str((Path(source).parent if source else Path()).absolute() / Path(path).expanduser())


def _transfer(values: Table) -> Transfer:
    return Transfer(
        backend=values["backend"],
        protocol=values["protocol"],
        devices=tuple(values["devices"]),
        ports=tuple(values["ports"]),
        lease_s=float(values["lease_s"]),
        read_s=float(values["read_s"]),
        leased_max=float(values["leased_max"]),
        chunked=values["chunked"],
    )


def _filled(table: Table, keys: dict[str, Key]) -> Table:
    return {name: table.get(name, key.default) for name, key in keys.items()}


def _group(entry: Table, source: str | None) -> EngineGroup:
    values = _filled(entry, ENGINE)
    replicas, data_parallel = _replicas(values)
    return EngineGroup(
        name=values["name"],
        role=Role(values["role"]),
        kind=values["kind"],
        replicas=replicas,
        device=_device(values),
        gpus=tuple(values["gpus"]),
        share_gpu=values["share_gpu"],
        open=values["open"],
        cpus=tuple(values["cpus"]),
        max_num_seqs=values["max_num_seqs"],
        max_num_batched_tokens=values["max_num_batched_tokens"],
        kv_cache_gb=float(values["kv_cache_gb"]),
        block_size=values["block_size"],
        prefix_caching=values["prefix_caching"],
        deterministic=values["deterministic"],
        prefix_quota=float(values["prefix_quota"]),
        kv_offload_gb=float(values["kv_offload_gb"]),
        kv_events=values["kv_events"],
        policy=values["policy"],
        inline_prefill=values["inline_prefill"],
        attention=values["attention"],
        enforce_eager=values["enforce_eager"],
        schedule_ahead=str(values["schedule_ahead"]).lower(),
        fetch_prefixes=str(values["fetch_prefixes"]).lower(),
        speculative=_speculative(values["speculative"]),
        url=(values["url"] or "").rstrip("/"),
        secret_file=absolute(values["secret_file"], source),
        bootstrap_port=values["bootstrap_port"],
        ready=values["ready"] or "",
        restart_with=tuple(values["restart_with"]),
        env=tuple(sorted(values["env"].items())),
        python=absolute(values["python"], source),
        args=tuple(values["args"]),
        tensor_parallel=values["tensor_parallel"],
        pipeline_parallel=values["pipeline_parallel"],
        data_parallel=data_parallel,
        sequence_parallel=values["sequence_parallel"],
        dtype=values["dtype"],
        quantization=values["quantization"] or "",
        gpu_memory_utilization=float(values["gpu_memory_utilization"]),
        connector=values["connector"] or "",
        store=values["store"] or "",
        depends_on=tuple(values["depends_on"]),
        process=values["process"] or "",
        nodes=tuple(values["nodes"]),
        given=frozenset(entry),
    )


def _replicas(values: Table) -> tuple[int, int]:
    """The engines of a group, and the data-parallel ranks of each. An attached engine is one process."""
    replicas, data_parallel = values["replicas"], values["data_parallel"]
    if can_launch(values["kind"]) and not (values["url"] or values["process"]) and launcher(values["kind"]).replicates:
        return replicas * data_parallel, 1
    return replicas, data_parallel


def _speculative(values: Table | None) -> Speculative | None:
    return None if values is None else msgspec.convert(values, Speculative)


def _command(entry: Table, source: str | None) -> Command:
    values = _filled(entry, COMMAND)
    program, *arguments = values["command"]
    # A program without a slash is searched in PATH.
    program = absolute(program, source) if "/" in program else program
    ports = tuple(
        (purpose, int(number or 0)) for purpose, _, number in (text.partition(":") for text in values["ports"])
    )
    ready = values["ready"] or ("tcp" if ports else "none")
    # What answers when it is ready must answer from then on.
    is_asked = ready == "tcp" or ready.startswith("http:")
    return Command(
        name=values["name"],
        command=(program, *arguments),
        ports=ports,
        ready=ready,
        alive=values["alive"] or (ready if is_asked else "none"),
        gpus=tuple(values["gpus"]),
        share_gpu=values["share_gpu"],
        cpus=tuple(values["cpus"]),
        env=tuple(sorted(values["env"].items())),
        depends_on=tuple(values["depends_on"]),
        restart_with=tuple(values["restart_with"]),
    )


def _store(entry: Table, source: str | None) -> Store:
    values = _filled(entry, STORE)
    return Store(
        name=values["name"],
        kind=values["kind"],
        python=absolute(values["python"], source),
        args=tuple(values["args"]),
        env=tuple(sorted(values["env"].items())),
        cpus=tuple(values["cpus"]),
        data_dir=absolute(values["data_dir"], source),
        segment_gb=float(values["segment_gb"]),
        buffer_gb=float(values["buffer_gb"]),
        metadata=values["metadata"],
        chunk_tokens=values["chunk_tokens"],
        given=frozenset(entry),
    )


def _device(values: Table) -> Device:
    """The device of a group: as given, else the kind's default. A group that lists GPUs uses them."""
    if values["device"]:
        return Device(values["device"])
    if values["gpus"]:
        return Device.CUDA
    is_attached = values["url"] or values["process"]
    return launcher(values["kind"]).device if can_launch(values["kind"]) and not is_attached else Device.CPU


def _last_part(model: str) -> str:
    # A model is `sample:NAME`, `ORGANIZATION/NAME` or a path.
    return model.rstrip("/").replace(":", "/").split("/")[-1]
