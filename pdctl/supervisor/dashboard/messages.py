"""What the server of the live page tells its own page, as JSON. Not an interface for scripts: those have the control
API."""

from __future__ import annotations

import msgspec

from pdctl.control_api import ExitReport, Lease, ServiceStatus
from pdctl.proxy_wire import RecentRequest


class EngineLive(msgspec.Struct, frozen=True):
    """What an engine does now. `tokens_s`: since the last sample; `held_back`: prompts that wait for leased blocks."""

    running: int
    waiting: int
    kv_used: float | None
    tokens_s: float | None
    leases: int
    held_back: int


class GpuName(msgspec.Struct, frozen=True):
    """A GPU of this machine. `memory` in bytes."""

    uuid: str
    index: int
    name: str
    memory: int


class About(msgspec.Struct, frozen=True):
    """What does not change while a page is open. `write`: whether its link may change the service."""

    machine: str
    version: str
    write: bool
    gpus: tuple[GpuName, ...]
    full_s: float
    verbs: tuple[str, ...]


class Frame(msgspec.Struct, frozen=True, omit_defaults=True):
    """One update of a page: the service now, and what is new since the update before. `now`: seconds since 1970;
    `last_exit`: which process and start ended last, whose report is there."""

    now: float
    service: ServiceStatus
    engines: dict[str, EngineLive]
    silent: dict[str, str]
    leases: tuple[Lease, ...]
    leases_total: int
    samples: dict[str, list[float | None]]
    events: tuple[msgspec.Raw, ...]
    last_exit: str = ""
    about: About | None = None


class Requests(msgspec.Struct, frozen=True):
    """The last requests of all proxies, newest first."""

    requests: tuple[RecentRequest, ...]


class ExitsShown(msgspec.Struct, frozen=True):
    """The last exits, newest first."""

    exits: tuple[ExitReport, ...]


class Findings(msgspec.Struct, frozen=True):
    """The doctor's last run. `at`: its end, seconds since 1970, 0 before the first; `error`: why there is none."""

    at: float = 0.0
    running: bool = False
    error: str = ""
    findings: tuple[msgspec.Raw, ...] = ()


class Said(msgspec.Struct, frozen=True):
    """Whether something was done, or the reason why not, as a sentence."""

    ok: bool
    reason: str = ""
