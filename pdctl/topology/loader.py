"""TOML to Topology: read, check every key, fill in defaults, then check the whole against this machine.

All problems of a file are reported in one run, each with its line.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import tomli

from pdctl.adapters import KINDS, can_launch
from pdctl.errors import ConfigError, PdctlError, Problem
from pdctl.host import ENGINE_PACKAGES, OTLP_PACKAGES, Host
from pdctl.host.models import UnknownModel, locate_model
from pdctl.topology.schema import ATTACHED, ENGINE, TABLES, Key
from pdctl.topology.spec import Device, EngineGroup, Expect, Proxy, Role, Service, Slo, Supervision, Topology, Transfer
from pdctl.topology.toml_lines import Path as KeyPath
from pdctl.topology.toml_lines import key_lines
from pdctl.user_files import read_api_keys, read_user_text, tls_problem

# A parsed TOML table: the one place where values have not been checked yet.
Table = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Document:
    """A file's values and where each stands."""

    data: Table
    lines: dict[KeyPath, int]

    def problem(self, path: KeyPath, message: str, hint: str | None = None) -> Problem:
        """A problem at the nearest known line of `path`."""
        line = next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), 0)
        return Problem(line, _dotted(path), message, hint)


def load_file(path: Path, host: Host) -> Topology:
    """Load and check a topology file. Raises ConfigError with every problem found, PdctlError if unreadable."""
    try:
        text = read_user_text(path)
    except FileNotFoundError:
        raise PdctlError(f"topology file {path} does not exist", "write one with: pdctl init") from None
    except (OSError, UnicodeDecodeError) as failure:
        raise PdctlError(f"topology file {path} cannot be read: {failure}") from failure
    return load_text(text, str(path), host)


def load_text(text: str, source: str, host: Host) -> Topology:
    """Load and check a topology given as text; `source` names it in messages."""
    try:
        document = _Document(tomli.loads(text), key_lines(text))
    except tomli.TOMLDecodeError as failure:
        raise ConfigError(source, [_syntax_problem(failure, text)]) from None
    problems = [*_key_problems(document)]
    if problems:
        raise ConfigError(source, sorted(problems, key=lambda problem: problem.line))
    topology = replace(_build(document.data, source), text=text)
    problems = [*_whole_problems(document, topology), *_host_problems(document, topology, host)]
    if problems:
        raise ConfigError(source, sorted(problems, key=lambda problem: problem.line))
    return topology


def _syntax_problem(failure: tomli.TOMLDecodeError, text: str) -> Problem:
    found = re.search(r"at line (\d+)", str(failure))
    line = int(found[1]) if found else text.count("\n") + 1
    return Problem(line, "", f"not TOML: {failure}")


# -- each key by itself ------------------------------------------------------------------------------------


def _key_problems(document: _Document) -> Iterator[Problem]:
    if not document.data:
        yield Problem(0, "", "the file is empty", "write a topology that fits this machine with: pdctl init")
        return
    known = [*TABLES, "engines"]
    for name, table in document.data.items():
        if name not in known:
            yield document.problem((name,), f"unknown table or key {name!r}", _did_you_mean(name, known))
        elif name == "engines":
            yield from _engine_problems(document, table)
        elif not isinstance(table, dict):
            yield document.problem((name,), f"must be a table: [{name}]")
        else:
            yield from _table_problems(document, (name,), table, TABLES[name])
    if "service" not in document.data:
        yield Problem(0, "service", "missing table [service]", 'name at least the model: model = "sample:gemma-3-270m"')
    if "engines" not in document.data:
        yield Problem(0, "engines", "no engine at all", "add [[engines]] with a name and a role")


def _engine_problems(document: _Document, engines: object) -> Iterator[Problem]:
    if not isinstance(engines, list) or not all(isinstance(entry, dict) for entry in engines):
        yield document.problem(("engines",), "must be a list of tables: [[engines]]")
        return
    if not engines:
        yield document.problem(("engines",), "no engine at all", "add [[engines]] with a name and a role")
    for index, entry in enumerate(cast(list[Table], engines)):
        yield from _table_problems(document, ("engines", index), entry, ENGINE)
        yield from _attached_problems(document, index, entry)


def _attached_problems(document: _Document, index: int, entry: Table) -> Iterator[Problem]:
    kind = entry.get("kind", "builtin")
    if "url" in entry:
        for name in entry:
            if name in ENGINE and name not in ATTACHED:
                hint = "it runs already: only its own start decides this"
                yield document.problem(("engines", index, name), f"{name} means nothing to an attached engine", hint)
    elif "secret_file" in entry:
        hint = "engines that pdctl starts get a secret of their own"
        yield document.problem(("engines", index, "secret_file"), "secret_file is for attached engines", hint)
    if kind in KINDS and "url" not in entry and not can_launch(str(kind)):
        hint = 'start it yourself and give its address: url = "http://HOST:PORT"'
        yield document.problem(("engines", index, "kind"), f"pdctl does not start engines of kind {kind!r}", hint)


def _table_problems(document: _Document, path: KeyPath, table: Table, keys: dict[str, Key]) -> Iterator[Problem]:
    for name, value in table.items():
        if name not in keys:
            yield document.problem((*path, name), f"unknown key {name!r}", _did_you_mean(name, list(keys)))
        elif wrong := keys[name].check(value):
            yield document.problem((*path, name), f"{wrong}; it is {_shown(value)}")
    for name, key in keys.items():
        if key.required and name not in table:
            yield document.problem(path, f"missing key {name!r}")


def _did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


# -- values to dataclasses ---------------------------------------------------------------------------------


def _build(data: Table, source: str | None) -> Topology:
    service = _filled(data.get("service", {}), TABLES["service"])
    proxy = _filled(data.get("proxy", {}), TABLES["proxy"])
    slo = _filled(data.get("slo", {}), TABLES["slo"])
    transfer = _filled(data.get("transfer", {}), TABLES["transfer"])
    supervision = _filled(data.get("supervisor", {}), TABLES["supervisor"])
    served = service["served_model_name"] or _last_part(service["model"])
    expect = _filled(data.get("expect", {}), TABLES["expect"])
    return Topology(
        service=Service(
            service["name"], service["model"], served, service["max_model_len"], tuple(service["engine_ports"])
        ),
        proxy=_proxy(proxy, source),
        slo=Slo(float(slo["ttft_ms"]), float(slo["tpot_ms"])),
        transfer=_transfer(transfer),
        engines=tuple(_group(entry, source) for entry in data["engines"]),
        supervision=_supervision(supervision),
        source=source,
        expect=Expect(float(expect["rate_gbps"]), expect["link_layer"], expect["mtu"], expect["gid_index"]),
    )


def _supervision(values: Table) -> Supervision:
    found: Table = {name: float(value) if isinstance(value, int) else value for name, value in values.items()}
    for name in ("max_restarts", "liveness_failures"):
        found[name] = values[name]
    return Supervision(**{**found, "stop_signals": tuple(values["stop_signals"])})


def _proxy(values: Table, source: str | None) -> Proxy:
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
        api_keys=_absolute(values["api_keys"], source),
        tls_cert=_absolute(values["tls_cert"], source),
        tls_key=_absolute(values["tls_key"], source),
        cors_origins=tuple(values["cors_origins"]),
        access_log=_absolute(values["access_log"], source),
        otlp_endpoint=values["otlp_endpoint"] or "",
    )


def _absolute(path: str | None, source: str | None) -> str:
    """A path as seen from the topology file's folder; "" for none."""
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
    return EngineGroup(
        name=values["name"],
        role=Role(values["role"]),
        kind=values["kind"],
        replicas=values["replicas"],
        device=Device(values["device"]),
        gpus=tuple(values["gpus"]),
        share_gpu=values["share_gpu"],
        open=values["open"],
        cpus=tuple(values["cpus"]),
        max_num_seqs=values["max_num_seqs"],
        max_num_batched_tokens=values["max_num_batched_tokens"],
        kv_cache_gb=float(values["kv_cache_gb"]),
        block_size=values["block_size"],
        url=(values["url"] or "").rstrip("/"),
        secret_file=_absolute(values["secret_file"], source),
        ready=values["ready"] or "",
        restart_with=tuple(values["restart_with"]),
        env=tuple(sorted(values["env"].items())),
    )


def _last_part(model: str) -> str:
    return model.rstrip("/").replace(":", "/").split("/")[-1]


# -- the topology as a whole -------------------------------------------------------------------------------


def _whole_problems(document: _Document, topology: Topology) -> Iterator[Problem]:
    seen: dict[str, str] = {"proxy": "the proxy", "supervisor": "the supervisor"}
    for index, group in enumerate(topology.engines):
        taken = next((name for name in (group.name, *group.replica_names()) if name in seen), None)
        if taken is not None:
            yield document.problem(("engines", index, "name"), f"the name {taken!r} is taken by {seen[taken]}")
        seen |= dict.fromkeys((group.name, *group.replica_names()), f"engines[{index}]")
        if group.gpus and group.device is Device.CPU:
            yield document.problem(("engines", index, "gpus"), "gpus on a CPU engine", 'set device = "cuda"')
    yield from _restart_problems(document, topology)
    yield from _transfer_problems(document, topology.transfer)
    roles = {group.role for group in topology.engines}
    yield from _proxy_problems(document, topology.proxy)
    if len({group.device for group in topology.engines if not group.is_attached}) > 1 and roles != {Role.HYBRID}:
        hint = "KV is float32 on the CPU and bfloat16 on GPUs: use one device for engines that exchange it"
        yield document.problem(("engines",), "CPU and CUDA engines cannot hand KV to each other", hint)
    if roles == {Role.PREFILL}:
        yield document.problem(("engines",), "prefill without decode", 'add an engine with role = "decode" or "hybrid"')
    if roles == {Role.DECODE}:
        yield document.problem(
            ("engines",), "decode without prefill", 'add an engine with role = "prefill" or "hybrid"'
        )


def _restart_problems(document: _Document, topology: Topology) -> Iterator[Problem]:
    started = [group.name for group in topology.engines if not group.is_attached]
    for index, group in enumerate(topology.engines):
        for name in group.restart_with:
            if name not in started or name == group.name:
                hint = f"other groups that pdctl starts: {', '.join(n for n in started if n != group.name) or 'none'}"
                yield document.problem(("engines", index, "restart_with"), f"{name!r} is no such group", hint)
        if group.ready.startswith("log:"):
            try:
                re.compile(group.ready.removeprefix("log:"))
            except re.error as failure:
                yield document.problem(("engines", index, "ready"), f"not a regular expression: {failure}")


def _proxy_problems(document: _Document, proxy: Proxy) -> Iterator[Problem]:
    if bool(proxy.tls_cert) != bool(proxy.tls_key):
        given = "tls_cert" if proxy.tls_cert else "tls_key"
        yield document.problem(("proxy", given), "tls_cert and tls_key belong together", "give both, or none")
    for key, path in (("api_keys", proxy.api_keys), ("tls_cert", proxy.tls_cert), ("tls_key", proxy.tls_key)):
        if path and not os.access(path, os.R_OK):
            hint = f"make one with: pdctl key NAME --file {path}" if key == "api_keys" else None
            yield document.problem(("proxy", key), f"{path} does not exist or cannot be read", hint)
    yield from _file_problems(document, proxy)
    if proxy.access_log and not Path(proxy.access_log).parent.is_dir():
        yield document.problem(("proxy", "access_log"), f"the folder of {proxy.access_log} does not exist")


def _file_problems(document: _Document, proxy: Proxy) -> Iterator[Problem]:
    """What stands in files that the proxy would fail over."""
    if proxy.api_keys and os.access(proxy.api_keys, os.R_OK):
        try:
            read_api_keys(Path(proxy.api_keys))
        except PdctlError as failure:
            yield document.problem(("proxy", "api_keys"), failure.message, failure.hint)
    if proxy.tls_cert and proxy.tls_key and os.access(proxy.tls_cert, os.R_OK) and os.access(proxy.tls_key, os.R_OK):
        key, reason = tls_problem(proxy.tls_cert, proxy.tls_key)
        if key:
            yield document.problem(("proxy", key), reason, "both must be PEM files, the key without a password")


def _transfer_problems(document: _Document, transfer: Transfer) -> Iterator[Problem]:
    """Keys that would do nothing."""
    on_host = transfer.backend in ("auto", "shm")
    hint = 'set backend = "mooncake" or "nixl"'
    if transfer.protocol != "auto" and on_host:
        yield document.problem(("transfer", "protocol"), f"means nothing to backend {transfer.backend!r}", hint)
    if transfer.devices and on_host:
        yield document.problem(("transfer", "devices"), f"means nothing to backend {transfer.backend!r}", hint)
    if transfer.devices and transfer.protocol == "tcp":
        yield document.problem(("transfer", "devices"), "RDMA devices for protocol 'tcp'", 'set protocol = "rdma"')
    if transfer.ports and transfer.backend != "mooncake":
        hint = 'set backend = "mooncake"'
        yield document.problem(("transfer", "ports"), f"means nothing to backend {transfer.backend!r}", hint)


def _host_problems(document: _Document, topology: Topology, host: Host) -> Iterator[Problem]:
    yield from _package_problems(document, topology, host)
    yield from _model_problems(document, topology, host)
    yield from _cpu_problems(document, topology, host)
    yield from _gpu_problems(document, topology, host)
    yield from _memory_problems(document, topology, host)


def port_problems(topology: Topology, host: Host) -> list[Problem]:
    """The proxy's port, when somebody else listens on it. Not asked of a service that is already up."""
    holder = host.listening.get(topology.proxy.port)
    if holder is None:
        return []
    line = 0
    if topology.source:
        text = read_user_text(Path(topology.source))
        line = key_lines(text).get(("proxy", "port"), 0)
    message = f"port {topology.proxy.port} is in use by {holder.describe()}"
    hint = "stop that process or choose another port under [proxy]"
    if "pdctl.proxy" in holder.command:
        hint = "another pdctl service has it: stop that with pdctl down -s NAME, or choose another port under [proxy]"
    return [Problem(line, "proxy.port", message, hint)]


def _package_problems(document: _Document, topology: Topology, host: Host) -> Iterator[Problem]:
    """Python packages that engines would fail without."""
    if topology.proxy.otlp_endpoint and host.lacks(OTLP_PACKAGES):
        hint = "install it with: pip install 'pdctl[otlp]'"
        yield document.problem(("proxy", "otlp_endpoint"), "the OpenTelemetry packages are not installed", hint)
    for index, group in enumerate(topology.engines):
        missing = host.lacks(ENGINE_PACKAGES)
        if missing and group.kind == "builtin" and not group.is_attached:
            extra = "cuda" if group.device is Device.CUDA else "engine"
            hint = f"install them with: pip install 'pdctl[{extra}]'"
            message = f"engines of kind 'builtin' need packages that are not installed: {', '.join(missing)}"
            yield document.problem(("engines", index), message, hint)
            return


def _model_problems(document: _Document, topology: Topology, host: Host) -> Iterator[Problem]:
    if all(group.is_attached for group in topology.engines):
        return  # its name is all that is needed
    base = Path(topology.source).parent if topology.source else Path()
    try:
        locate_model(topology.service.model, host.cache_root, base)
    except UnknownModel as failure:
        yield document.problem(("service", "model"), str(failure), _nearby_model(topology.service.model, base))


def _nearby_model(spec: str, base: Path) -> str | None:
    """A model directory beside the one that is not there, of nearly that name."""
    wanted = base / Path(spec).expanduser()
    try:
        there = [folder.name for folder in wanted.parent.iterdir() if (folder / "config.json").is_file()]
    except OSError:
        return None
    near = difflib.get_close_matches(wanted.name, there, 1)
    return f'did you mean model = "{Path(spec).parent / near[0]}"?' if near else None


def _cpu_problems(document: _Document, topology: Topology, host: Host) -> Iterator[Problem]:
    wanted: list[tuple[KeyPath, tuple[int, ...]]] = [(("proxy", "cpus"), topology.proxy.cpus)]
    wanted += [(("engines", index, "cpus"), group.cpus) for index, group in enumerate(topology.engines)]
    allowed = ", ".join(map(str, host.cpus))
    for path, cpus in wanted:
        for cpu in cpus:
            if cpu not in host.cpus:
                yield document.problem(path, f"CPU {cpu} does not exist or is not ours", f"we may use: {allowed}")


def _memory_problems(document: _Document, topology: Topology, host: Host) -> Iterator[Problem]:
    wanted = sum(
        group.kv_cache_gb * group.replicas
        for group in topology.engines
        if group.device is Device.CPU and not group.is_attached
    )
    there = host.memory / 2**30
    if wanted > there:
        index, _ = max(enumerate(topology.engines), key=lambda entry: entry[1].kv_cache_gb * entry[1].replicas)
        message = f"the engines' KV takes {wanted:g} GiB together and this machine has {there:.0f} GiB of memory"
        yield document.problem(("engines", index, "kv_cache_gb"), message, "lower kv_cache_gb or replicas")


def _gpu_problems(document: _Document, topology: Topology, host: Host) -> Iterator[Problem]:
    holders: dict[int | str, tuple[str, bool]] = {}
    known = ", ".join(str(gpu.index) if gpu.index >= 0 else gpu.uuid for gpu in host.gpus) or "none"
    ours = f"{host.gpus_by} leaves us: {known}" if host.gpus_by else f"NVML lists: {known}"
    for index, group in enumerate(topology.engines):
        if group.device is not Device.CUDA:
            continue
        path: KeyPath = ("engines", index, "gpus" if group.gpus else "device")
        if group.gpus and len(group.gpus) not in (1, group.replicas):
            yield document.problem(
                path, f"{len(group.gpus)} gpus for {group.replicas} replicas", "name one per replica"
            )
        for gpu in group.gpus:
            if host.gpu_named(gpu) is None:
                what = "is not ours" if host.gpus_by else "does not exist, or is not the only one of that name"
                yield document.problem(path, f"GPU {gpu} {what}", ours)
        if not host.gpus:
            if host.gpus_by:
                yield document.problem(path, "the environment leaves us no GPU", host.gpus_by)
                continue
            hint = "check nvidia-smi, and that nvidia-ml-py is installed (pip install 'pdctl[cuda]')"
            yield document.problem(path, "no GPU was found on this machine", hint)
        yield from _sharing_problems(document, path, group, holders)


def _sharing_problems(
    document: _Document, path: KeyPath, group: EngineGroup, holders: dict[int | str, tuple[str, bool]]
) -> Iterator[Problem]:
    spread = group.gpus * group.replicas if len(group.gpus) == 1 else group.gpus
    for name, gpu in zip(group.replica_names(), spread, strict=False):
        if gpu in holders and not (group.share_gpu and holders[gpu][1]):
            message = f"GPU {gpu} is given to {holders[gpu][0]} and {name}"
            yield document.problem(path, message, "give each its own, or set share_gpu = true on both")
        holders.setdefault(gpu, (name, group.share_gpu))


def _dotted(path: KeyPath) -> str:
    words = ""
    for part in path:
        words += f"[{part}]" if isinstance(part, int) else f".{part}"
    return words.lstrip(".")
