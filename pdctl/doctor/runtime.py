"""Checks of what is installed: the engine's packages, transfer libraries, what they load; and of the environment."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pdctl.doctor import Finding, Severity

# Package to what it is for and how to get it.
_PACKAGES = {
    "torch": ("the builtin engine", "pip install 'pdctl[engine]'"),
    "tokenizers": ("the builtin engine", "pip install 'pdctl[engine]'"),
    "mooncake-transfer-engine": ("KV over RDMA or TCP between hosts", "pip install 'pdctl[engine]'"),
    "nixl": ("KV over NIXL", "pip install 'pdctl[nixl]'"),
}
_NEEDED = ("torch", "tokenizers")
_OFF = {
    "MC_FORCE_TCP": "Mooncake uses TCP even where there is RDMA",
    "NCCL_IB_DISABLE": "NCCL uses sockets even where there is RDMA",
    "NCCL_P2P_DISABLE": "NCCL goes through host memory even where GPUs reach each other",
}


# Wheels of one library for several platforms.
_ALSO = {"mooncake-transfer-engine": "mooncake-transfer-engine-non-cuda", "nixl": "nixl-cu12"}


def _version(name: str) -> str | None:
    for known in filter(None, (name, _ALSO.get(name))):
        try:
            return importlib.metadata.version(known)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@dataclass(frozen=True, slots=True)
class RuntimeScene:
    """`version`: of an installed package, or None; `library`: whether the loader finds one; both can be planted."""

    env: dict[str, str]
    rdma: bool = False
    hosts: tuple[str, ...] = ()
    version: Callable[[str], str | None] = _version
    library: Callable[[str], bool] = lambda name: ctypes.util.find_library(name) is not None


def check(scene: RuntimeScene) -> list[Finding]:
    """All checks."""
    return [finding for one in (packages, verbs_library, switches, transports, proxies) for finding in one(scene)]


def packages(scene: RuntimeScene) -> Iterator[Finding]:
    """What is needed is a fault when it is missing, the rest is told."""
    for name, (purpose, fix) in _PACKAGES.items():
        version = scene.version(name)
        if version is not None:
            yield Finding("runtime.package", Severity.OK, name, version)
        else:
            severity = Severity.WARNING if name in _NEEDED else Severity.INFO
            yield Finding(
                "runtime.package", severity, name, "not installed", f"for {purpose}", "importlib.metadata", "", fix
            )


def verbs_library(scene: RuntimeScene) -> Iterator[Finding]:
    """Mooncake's wheel links against it, also for TCP."""
    if scene.version("mooncake-transfer-engine") is None:
        return
    if scene.library("ibverbs"):
        yield Finding("runtime.libibverbs", Severity.OK, "libibverbs.so.1", "found")
    else:
        severity = Severity.CRITICAL if scene.rdma else Severity.WARNING
        yield Finding(
            "runtime.libibverbs",
            severity,
            "libibverbs.so.1",
            "not found",
            "the loader finds it",
            "ldconfig -p",
            "Mooncake cannot be loaded, not even for TCP",
            "apt-get install libibverbs1 (Debian, Ubuntu); dnf install libibverbs",
        )


def switches(scene: RuntimeScene) -> Iterator[Finding]:
    """Left over from some debugging."""
    for name, meaning in _OFF.items():
        if scene.env.get(name, "0") not in ("", "0"):
            severity = Severity.CRITICAL if scene.rdma and name == "MC_FORCE_TCP" else Severity.WARNING
            yield Finding(
                "env.switch",
                severity,
                name,
                f"{name}={scene.env[name]}",
                "not set",
                "environment",
                meaning,
                f"unset {name}",
            )


def transports(scene: RuntimeScene) -> Iterator[Finding]:
    """UCX_TLS without a transport that RDMA needs."""
    given = scene.env.get("UCX_TLS", "")
    words = [word.lstrip("^") for word in given.split(",") if word]
    limits = bool(words) and not given.startswith("^") and "all" not in words
    if limits and scene.rdma and not any(word.startswith(("rc", "dc", "ud", "ib")) for word in words):
        yield Finding(
            "env.ucx_tls",
            Severity.CRITICAL,
            "UCX_TLS",
            f"UCX_TLS={given}",
            "rc or ib among them",
            "environment",
            "NIXL cannot use RDMA",
            "unset UCX_TLS, or add rc",
        )


def proxies(scene: RuntimeScene) -> Iterator[Finding]:
    """HTTP proxies between our own processes (Mooncake guide: unset them)."""
    names = [name for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY") if scene.env.get(name)]
    bypass = scene.env.get("no_proxy", "") or scene.env.get("NO_PROXY", "")
    for name in names:
        missing = [host for host in scene.hosts if host not in bypass.split(",") and bypass != "*"]
        if missing:
            yield Finding(
                "env.proxy",
                Severity.WARNING,
                name,
                f"{name} is set, and no_proxy lacks {', '.join(missing)}",
                "our own hosts in no_proxy",
                "environment",
                "engines' calls to each other go to a proxy",
                f"export no_proxy={','.join([*filter(None, [bypass]), *missing])}",
            )
