"""Checks of the engines' Python environment: packages, transfer libraries, and shared libraries that they load."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pdctl.doctor import Finding, Severity
from pdctl.host.packages import installed_package

# Package to its purpose and how to install it.
_PACKAGES = {
    "torch": ("the builtin engine", "pip install 'pdctl[engine]'"),
    "tokenizers": ("the builtin engine", "pip install 'pdctl[engine]'"),
    "mooncake-transfer-engine": ("KV over RDMA or TCP between hosts", "pip install 'pdctl[engine]'"),
    "nixl": ("KV over NIXL", "pip install 'pdctl[nixl]'"),
}
_NEEDED = ("torch", "tokenizers")
# Alternative wheels of the same library.
_ALSO = {"mooncake-transfer-engine": "mooncake-transfer-engine-non-cuda", "nixl": "nixl-cu12"}


_OLDEST_TRANSFORMERS = (5, 17)
_NVSHMEM_FILES = ("libnvshmem_host.so", "nvshmem_bootstrap_uid.so")


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _version(name: str) -> str | None:
    return _installed(name) or (_installed(_ALSO[name]) if name in _ALSO else None)


def _loads(name: str) -> bool:
    """Whether the dynamic loader finds the library."""
    try:
        ctypes.CDLL(f"lib{name}.so.1")
    except OSError:
        return False
    return True


def _folder(name: str) -> Path | None:
    """The folder of a namespace package such as nvidia.nvshmem."""
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    places = list(found.submodule_search_locations or ()) if found else []
    return Path(places[0]) if places else None


def cuda_of_torch() -> tuple[int, int] | None:
    """The CUDA version that torch was built for, from the runtime package that came with it; None for a CPU build."""
    names = ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu13", "nvidia-cuda-runtime-cu12")
    found = [words for name in names if len(words := (_version(name) or "").split(".")) > 1]
    # With several runtimes, it is unknown which one torch uses.
    if len(found) != 1 or not (found[0][0].isdecimal() and found[0][1].isdecimal()):
        return None
    return int(found[0][0]), int(found[0][1])


@dataclass(frozen=True, slots=True)
class RuntimeFacts:
    """Facts for runtime checks. `version`: version of an installed package, or None; `library`: whether the loader
    finds a library; `folder`: a package's folder; tests replace all three. `cuda`: the topology has engines on GPUs;
    `builtin`: it has engines of the builtin kind."""

    env: dict[str, str]
    rdma: bool = False
    cuda: bool = False
    builtin: bool = True
    version: Callable[[str], str | None] = _version
    library: Callable[[str], bool] = _loads
    folder: Callable[[str], Path | None] = _folder
    proc_root: Path = Path("/proc")
    sysfs_root: Path = Path("/sys")
    exactly: Callable[[str], bool] = lambda name: _installed(name) is not None


def elsewhere(facts: RuntimeFacts, python: str) -> RuntimeFacts:
    """The same facts about the environment of another interpreter; "" for one that is not known."""

    def installed(name: str) -> str | None:
        found = installed_package(python, (name,)) if python else None
        return found[1] if found else None

    def version(name: str) -> str | None:
        return installed(name) or (installed(_ALSO[name]) if name in _ALSO else None)

    return replace(facts, version=version, folder=lambda _: None, exactly=lambda name: installed(name) is not None)


def check(facts: RuntimeFacts) -> list[Finding]:
    """Run all checks."""
    return [finding for one in CHECKS for finding in one(facts)]


def packages(facts: RuntimeFacts) -> Iterator[Finding]:
    """Packages: a missing required one is a warning, an optional one is info."""
    for name, (purpose, fix) in _PACKAGES.items():
        version = facts.version(name)
        if version is not None:
            yield Finding("runtime.package", Severity.OK, name, version)
        else:
            severity = Severity.WARNING if name in _NEEDED and facts.builtin else Severity.INFO
            yield Finding(
                "runtime.package", severity, name, "not installed", f"for {purpose}", "importlib.metadata", "", fix
            )


def verbs_library(facts: RuntimeFacts) -> Iterator[Finding]:
    """libibverbs: Mooncake's wheel links against it, even for TCP."""
    if facts.version("mooncake-transfer-engine") is None:
        return
    if facts.library("ibverbs"):
        yield Finding("runtime.libibverbs", Severity.OK, "libibverbs.so.1", "found")
    else:
        severity = Severity.CRITICAL if facts.rdma else Severity.WARNING
        yield Finding(
            "runtime.libibverbs",
            severity,
            "libibverbs.so.1",
            "not found",
            "found by the loader",
            "ldconfig -p",
            "Mooncake cannot be loaded, not even for TCP",
            "apt-get install libibverbs1 (Debian, Ubuntu); dnf install libibverbs",
        )


def combinations(facts: RuntimeFacts) -> Iterator[Finding]:
    """Versions that are known not to work together."""
    torch, transformers = facts.version("torch") or "", facts.version("transformers")
    if facts.cuda and "+cpu" in torch:
        yield Finding(
            "runtime.versions", Severity.CRITICAL, "torch", f"{torch}, but the topology has device = \"cuda\"",
            "a build with CUDA", "importlib.metadata", "engines will find no GPU",
            "pip install --force-reinstall torch",
        )  # fmt: skip
    if facts.builtin and transformers and _numbers(transformers) < _OLDEST_TRANSFORMERS:
        yield Finding(
            "runtime.versions", Severity.CRITICAL, "transformers", transformers,
            f"{'.'.join(map(str, _OLDEST_TRANSFORMERS))} or newer", "importlib.metadata",
            "it lacks the attention interface that the engine needs", "pip install -U 'transformers>=5.17,<6'",
        )  # fmt: skip
    both = [name for name in ("mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda") if facts.exactly(name)]
    if len(both) == 2:
        yield Finding(
            "runtime.versions", Severity.WARNING, "mooncake", f"{both[0]} and {both[1]} are both installed", "one",
            "importlib.metadata", "they install the same files: it is undefined which one is loaded",
            f"pip uninstall -y {both[1] if facts.cuda else both[0]}; pip install --force-reinstall "
            f"{both[0] if facts.cuda else both[1]}",
        )  # fmt: skip
    elif facts.cuda and both == ["mooncake-transfer-engine-non-cuda"]:
        yield Finding(
            "runtime.versions", Severity.WARNING, "mooncake", "the build without CUDA", "mooncake-transfer-engine",
            "importlib.metadata", "KV of GPUs goes through host memory",
            "pip uninstall -y mooncake-transfer-engine-non-cuda; pip install mooncake-transfer-engine",
        )  # fmt: skip


def nvshmem(facts: RuntimeFacts) -> Iterator[Finding]:
    """NVSHMEM, if installed: whether it is complete. DeepEP's older kernels need 3.3.9; pdctl does not need it."""
    root = _nvshmem_root(facts)
    if root is None:
        return
    library = root / "lib"
    missing = [name for name in _NVSHMEM_FILES if not any(library.glob(f"{name}*"))]
    version = facts.version("nvidia-nvshmem-cu12") or facts.version("nvidia-nvshmem-cu13") or "of unknown version"
    if missing:
        yield Finding(
            "nvshmem.install", Severity.WARNING, str(root), f"{', '.join(missing)} is missing",
            "a complete installation",
            str(library), "programs built against it fail to load",
            "pip install --force-reinstall nvidia-nvshmem-cu12", "DeepEP, find_pkgs",
        )  # fmt: skip
    else:
        yield Finding("nvshmem.install", Severity.OK, "nvshmem", f"{version} in {root}")


def ibgda(facts: RuntimeFacts) -> Iterator[Finding]:
    """NVSHMEM, if installed: the driver settings that IBGDA needs (DeepEP's installation guide)."""
    if _nvshmem_root(facts) is None:
        return
    try:
        params = (facts.proc_root / "driver/nvidia/params").read_text()
    except OSError:
        return
    settings = dict(line.split(": ", 1) for line in params.splitlines() if ": " in line)
    streams = settings.get("EnableStreamMemOPs", "0").strip() == "1"
    peers = "PeerMappingOverride=1" in settings.get("RegistryDwords", "")
    if not (streams and peers) and not (facts.sysfs_root / "module/gdrdrv").is_dir():
        yield Finding(
            "nvshmem.ibgda", Severity.INFO, "nvshmem", "neither the driver's peer mapping nor gdrdrv",
            "one of them, for IBGDA", "/proc/driver/nvidia/params, /sys/module/gdrdrv",
            "kernels that use it fail with `init failed for transport: IBGDA`",
            "modprobe gdrdrv; or NVreg_EnableStreamMemOPs=1, PeerMappingOverride=1 (it lowers a kernel check)",
            "DeepEP",
        )  # fmt: skip


def nccl(facts: RuntimeFacts) -> Iterator[Finding]:
    """The NCCL version, if installed: DeepEP's newer kernels need 2.30.4."""
    found = facts.version("nvidia-nccl-cu12") or facts.version("nvidia-nccl-cu13")
    if found:
        yield Finding("nccl.install", Severity.OK, "nccl", found)


def _nvshmem_root(facts: RuntimeFacts) -> Path | None:
    named = (facts.env.get(name) for name in ("EP_NVSHMEM_ROOT_DIR", "NVSHMEM_DIR", "NVSHMEM_HOME"))
    return next((Path(value) for value in named if value), None) or facts.folder("nvidia.nvshmem")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(word) for word in version.split(".")[:2] if word.isdecimal())


CHECKS: tuple[Callable[[RuntimeFacts], Iterator[Finding]], ...] = (
    packages, verbs_library, combinations, nvshmem, ibgda, nccl,
)  # fmt: skip
