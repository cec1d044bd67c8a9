"""One file for a bug report: findings, facts, plan, versions, the end of the logs; no secrets, no prompts."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import platform
import re
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import tomli

from pdctl import __version__
from pdctl.doctor import Finding
from pdctl.doctor.inspection import Inspection
from pdctl.host import state_root

_MOST_LOG_BYTES = 256 * 1024
_HIDDEN = "[removed]"
# Names with secret values. "tokens" is not one: it names counts everywhere.
_TELLTALE = r"(?:key|pass(?!es\b)|token(?!s)|secret|credential|auth|cookie|session)"
_HIDDEN_NAME = re.compile(rf"{_TELLTALE}|^text$|^prompt$|^messages$|^content$", re.I)
_SECRETS = (
    re.compile(r"(?i)\b(?:bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}"),
    re.compile(r"\b(?:sk|hf|ghp|gho|xox[bp]|AKIA|pdctl)[-_][-_A-Za-z0-9]{8,}|\bAKIA[A-Z0-9]{8,}"),
    # Up to the last @ of the word: passwords may contain @ and slashes.
    re.compile(r"(?<=://)[^\s\"'@]{0,256}@(?:[^\s\"'@]{0,256}@)*"),
    # A line from the middle of a key file.
    re.compile(r"^[A-Za-z0-9+/=]{60,}$"),
)
# Headers with secrets: the rest of the line.
_HEADER = re.compile(r"(?i)((?:proxy-)?authorization|(?:set-)?cookie|x-api-key)([\"']?\s*[:=]).*$")
# An option of a command line with its value.
_OPTION = re.compile(
    rf"(?i)((?<![\w-])--?[\w-]{{0,40}}{_TELLTALE}[\w-]{{0,40}}[\"',]{{0,3}}[ =]+)(\"[^\"]*\"|'[^']*'|\S+)"
)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,20}PRIVATE KEY-----|\Z)", re.S
)
# `name = value`, `"name": "value"` and NAME=value with a name that suggests a secret.
_NAMED_SECRET = re.compile(
    rf"""(?i)(?<![\w.-])(["']?[\w.-]{{0,64}}?{_TELLTALE}[\w.-]{{0,64}}["']?\s*[=:]\s*)"""
    r"""("(?:[^"\\]|\\.)*"|'[^']*'|[^\s,}\]]+)"""
)
# Client text as JSON, as JSON within JSON, or as a Python repr: the rest of the line.
_PROMPTS = re.compile(r"""(\\?["'](?:prompt|content|text|messages|input)\\?["']\s*:).*$""")
# Longer lines are not log messages, and the patterns would be slow on them.
_LONGEST_LINE = 64 * 1024
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "xgrammar", "pyzmq", "mooncake-transfer-engine",
             "mooncake-transfer-engine-non-cuda", "nixl", "nixl-cu12", "vllm", "sglang", "lmdeploy", "uvicorn",
             "uvloop",
             "httptools", "starlette", "httpx", "nvidia-ml-py", "nvidia-nccl-cu12", "nvidia-nvshmem-cu12")  # fmt: skip
# Environment variables that matter for serving.
_TELLING = ("PDCTL_", "MC_", "NCCL_", "UCX_", "NIXL_", "NVSHMEM_", "CUDA_", "OMP_", "VLLM_", "SGLANG_", "http",
"no_proxy",
            "HTTP", "NO_PROXY", "LD_LIBRARY_PATH", "WITH_NVIDIA_PEERMEM")  # fmt: skip


def clean(text: str) -> str:
    """The text without secrets and without client text."""
    return "".join(map(_clean_line, _PRIVATE_KEY.sub(_HIDDEN, text).splitlines(keepends=True)))


def _clean_line(line: str) -> str:
    if len(line) > _LONGEST_LINE:
        return f"[a line of {len(line)} characters was removed]\n"
    text = line.rstrip("\r\n")
    for pattern in _SECRETS:
        text = pattern.sub(_HIDDEN, text)
    text = _HEADER.sub(rf"\1\2 {_HIDDEN}", text)
    text = _OPTION.sub(rf"\1{_HIDDEN}", text)
    text = _NAMED_SECRET.sub(rf"\1{_HIDDEN}", text)
    return _PROMPTS.sub(rf"\1 {_HIDDEN}", text) + line[len(line.rstrip("\r\n")) :]


def write(path: Path, inspection: Inspection, findings: list[Finding]) -> list[str]:
    """Write the file, readable only by its owner, and return the names of its members. Raises OSError."""
    names = []
    new = path.with_name(f".{path.name}.{os.getpid()}")
    # A new file: the one it replaces may be readable by others.
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, text in _parts(inspection, findings):
            data = text.encode()
            entry = tarfile.TarInfo(f"pdctl-doctor/{name}")
            entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
            archive.addfile(entry, io.BytesIO(data))
            names.append(name)
    new.replace(path)
    return names


def _parts(inspection: Inspection, findings: list[Finding]) -> Iterator[tuple[str, str]]:
    yield "findings.json", _json([finding.to_dict() for finding in findings])
    yield "facts.json", _json(_facts(inspection))
    yield "versions.json", _json(_versions())
    yield "environment.json", _json(_environment(inspection.where.env))
    if inspection.plan is not None:
        yield "plan.json", _json(inspection.plan.to_dict())
    if inspection.topology is not None and inspection.topology.source:
        # Clean parsed values, not lines: a value may span several lines.
        yield (
            "topology.json",
            _json(tomli.loads(inspection.topology.text or Path(inspection.topology.source).read_text())),
        )
    name = inspection.plan.service if inspection.plan else ""
    folder = state_root() / name / "logs"
    for log in sorted([*folder.glob("*.log"), *folder.glob("*.jsonl")]) if name else ():
        yield f"logs/{log.name}", _records(_tail(log)) if log.suffix == ".jsonl" else clean(_tail(log))


def _records(text: str) -> str:
    """Clean JSON lines value by value."""
    found = []
    for line in text.splitlines():
        try:
            found.append(json.dumps(_scrubbed(json.loads(line))))
        except ValueError:
            found.append(clean(line))
    return "\n".join([*found, ""])


def _json(value: object) -> str:
    return json.dumps(_scrubbed(value), indent=2, default=str)


def _scrubbed(value: object) -> object:
    """Remove values named like secrets or client text, and clean all other strings."""
    if isinstance(value, dict):
        return {str(name): _hidden_or_not(str(name), inner) for name, inner in value.items()}
    if isinstance(value, str):
        return clean(value)
    if not isinstance(value, list | tuple):
        return value
    # The word after an option that takes a secret is the secret.
    hides = [False, *(isinstance(one, str) and one.startswith("-") and "=" not in one and
                      bool(_HIDDEN_NAME.search(one)) for one in value)]  # fmt: skip
    return [_HIDDEN if hide else _scrubbed(inner) for hide, inner in zip(hides, value, strict=False)]


def _hidden_or_not(name: str, value: object) -> object:
    if name == "env" and isinstance(value, dict):
        # Variables may have any name, so only those known to matter for serving are shown.
        return {key: _scrubbed(inner) if key.startswith(_TELLING) else _HIDDEN for key, inner in value.items()}
    if _HIDDEN_NAME.search(name) and isinstance(value, str | int | list) and not isinstance(value, bool) and value:
        return _HIDDEN
    return _scrubbed(value)


def _facts(inspection: Inspection) -> dict[str, object]:
    host = inspection.host
    return {
        "kernel": platform.release(),
        "system": platform.platform(),
        "cpus": host.cpus,
        "memory_bytes": host.memory,
        "gpus": [gpu.__repr__() for gpu in inspection.gpus.gpus],
        "gpu_driver": inspection.gpus.driver or inspection.gpus.absence,
        "rdma": inspection.tree.support.value,
        "rdma_devices": [
            {
                "name": device.name,
                "pci": device.pci,
                "numa_node": device.numa_node,
                "files": {name: value.text for name, value in (device.raw | device.pci_raw).items()},
                "ports": [
                    {
                        "port": port.number,
                        "files": {name: value.text for name, value in port.raw.items()},
                        "gids": [f"{gid.index} {gid.gid} {gid.kind} {gid.netdev}" for gid in port.gids],
                        "counters": port.counters | port.hw_counters,
                    }
                    for port in device.ports
                ],
            }
            for device in inspection.tree.devices
        ],
        "classes": {f"{gpu} {device}": found for (gpu, device), found in host.layout.classes.items()},
    }


def _versions() -> dict[str, str]:
    found = {"pdctl": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _environment(env: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in sorted(env.items()) if name.startswith(_TELLING)}


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            before = max(0, path.stat().st_size - _MOST_LOG_BYTES)
            file.seek(before)
            text = file.read(_MOST_LOG_BYTES).decode(errors="replace")
            # Drop the first, partial line: the patterns cannot recognize what it contains.
            return text.partition("\n")[2] if before else text
    except OSError as failure:
        return f"{path}: {failure.strerror}\n"
