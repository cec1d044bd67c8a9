"""Checks of environment variables that contradict the topology or each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pdctl.doctor import Finding, Severity
from pdctl.transports import TRANSPORTS

_OFF = {
    "MC_FORCE_TCP": "Mooncake uses TCP even if RDMA is available",
    "NCCL_IB_DISABLE": "NCCL uses sockets even if RDMA is available",
    "NCCL_P2P_DISABLE": "NCCL goes through host memory even if GPUs have peer access",
}
# Variables that name RDMA devices. NCCL's may begin with ^ (all but) or = (exact), and otherwise matches prefixes.
_NAMING = ("UCX_NET_DEVICES", "NCCL_IB_HCA", "MC_TE_FILTERS", "MC_MS_FILTERS", "NVSHMEM_HCA_LIST")
# The transport that reads a variable, by prefix.
_READERS = {info.environment: name for name, info in TRANSPORTS.items() if info.environment}
_ANY = frozenset({"", "all"})


@dataclass(frozen=True, slots=True)
class EnvironmentFacts:
    """`env`: the engine's environment; `rdma`: the topology requires RDMA; `devices`: RDMA device name to whether it is
    up."""

    env: dict[str, str]
    rdma: bool = False
    devices: dict[str, bool] = field(default_factory=dict)
    backend: str = ""

    def weight(self, variable: str) -> Severity:
        """The severity of a contradiction: critical only if the topology's transport reads the variable."""
        reader = next((name for prefix, name in _READERS.items() if variable.startswith(prefix)), "")
        return Severity.CRITICAL if self.rdma and self.backend in ("", reader) else Severity.WARNING


def check(facts: EnvironmentFacts) -> list[Finding]:
    """Run all checks."""
    return [finding for one in CHECKS for finding in one(facts)]


def switches(facts: EnvironmentFacts) -> Iterator[Finding]:
    """Variables that disable RDMA or peer access, often left over from debugging."""
    for name, meaning in _OFF.items():
        # Mooncake checks whether its variable is set, not its value.
        is_set = name in facts.env if name == "MC_FORCE_TCP" else facts.env.get(name, "0") not in ("", "0")
        if is_set:
            severity = facts.weight(name)
            yield Finding("env.switch", severity, name, f"{name}={facts.env[name]}", "not set", "environment", meaning,
                          f"unset {name}")  # fmt: skip


def transports(facts: EnvironmentFacts) -> Iterator[Finding]:
    """UCX_TLS without a transport for RDMA."""
    given = facts.env.get("UCX_TLS", "")
    words = [word.lstrip("^") for word in given.split(",") if word]
    limits = bool(words) and not given.startswith("^") and "all" not in words
    if limits and facts.rdma and not any(word.startswith(("rc", "dc", "ud", "ib")) for word in words):
        yield Finding(
            "env.ucx_tls", facts.weight("UCX_TLS"), "UCX_TLS", f"UCX_TLS={given}", "rc or ib in the list",
            "environment",
            "NIXL cannot use RDMA", "unset UCX_TLS, or add rc",
        )  # fmt: skip


def devices(facts: EnvironmentFacts) -> Iterator[Finding]:
    """Variables that name RDMA devices that are missing or down."""
    if not facts.devices and not facts.rdma:
        return
    for variable in _NAMING:
        given = facts.env.get(variable, "")
        if given in _ANY or given.startswith("^"):
            continue
        for word in given.removeprefix("=").split(","):
            name = word.partition(":")[0].strip()
            near = [device for device in facts.devices if device == name or _is_prefix(variable, given, name, device)]
            if not name or (near and any(facts.devices[device] for device in near)):
                continue
            up = [device for device, is_up in facts.devices.items() if is_up]
            yield Finding(
                "env.devices", facts.weight(variable), variable,
                f"{variable}={given}: {name} is {'down' if near else 'not a device of this machine'}",
                f"a device that is up: {', '.join(up) or 'there is none'}", "environment, /sys/class/infiniband",
                "the library finds no device, or falls back to TCP",
                f"export {variable}={_as_named(variable, up[0])}" if up else f"unset {variable}",
            )  # fmt: skip


def _as_named(variable: str, device: str) -> str:
    """The device as the variable needs it: UCX needs the port too."""
    return f"{device}:1" if variable == "UCX_NET_DEVICES" else device


def _is_prefix(variable: str, given: str, name: str, device: str) -> bool:
    """Whether NCCL matches the name as a prefix: it does unless the list begins with `=`."""
    return variable == "NCCL_IB_HCA" and not given.startswith("=") and bool(name) and device.startswith(name)


CHECKS: tuple[Callable[[EnvironmentFacts], Iterator[Finding]], ...] = (switches, transports, devices)
