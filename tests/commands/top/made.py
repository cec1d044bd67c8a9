"""Statuses for the tests of `pdctl top`."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import strategies as st

from pdctl.control_api import (
    AttachedStatus,
    Event,
    LastExit,
    Link,
    MeasuredProcess,
    MeasuredStatus,
    ProcessState,
)
from tests.commands.inspect.test_status import process as a_process

NOW = 1_800_000_000.0
STATES: tuple[ProcessState, ...] = (
    "pending", "starting", "ready", "draining", "drained", "stopping", "clearing", "backoff", "stopped", "failed",
)  # fmt: skip


def process(name: str, **changed: Any) -> MeasuredProcess:
    role = name.rpartition("-")[0] or name
    return msgspec.structs.replace(a_process(name), **({"role": role, "group": role} | changed))


def exited(reason: str = "killed by SIGKILL") -> LastExit:
    return LastExit(at="2026-11-29T02:00:00+00:00", code=None, signal="SIGKILL", reason=reason, expected=False,
                    by="another process", oom=False)  # fmt: skip


def link(peer: str, reader: str, **changed: Any) -> Link:
    fields: dict[str, Any] = {
        "transport": "shm", "protocol": "shm", "reason": "the peer is on this host; both have shm", "fallback": "",
        "error": "", "refused": False, "pulls": 212, "bytes": 4 << 30, "gbps": 11.8,
    }  # fmt: skip
    return Link(reader=reader, peer=peer, epoch="0-1", **(fields | changed))


def attached(name: str, **changed: Any) -> AttachedStatus:
    fields: dict[str, Any] = {"role": "decode", "kind": "vllm", "host": "10.0.0.7", "port": 8100, "secret_file": "",
                              "ports": {}, "answers": True}  # fmt: skip
    return AttachedStatus(name=name, **(fields | changed))


def status(*processes: MeasuredProcess, **changed: Any) -> MeasuredStatus:
    fields: dict[str, Any] = {
        "service": "t", "state": "ready", "failure": None, "proxy_url": "http://127.0.0.1:8000", "model": "m",
        "served_model_name": "m", "tls_cert": "", "supervisor_pid": 1, "run_dir": "/r", "log_dir": "/l", "source": "",
        "trees": "cgroup", "apply": None, "attached": (), "links": (),
    }  # fmt: skip
    return MeasuredStatus(processes=processes, **(fields | changed))


def service(prefills: int = 1, decodes: int = 1, **changed: Any) -> MeasuredStatus:
    """A proxy and engines, with a link for each pair."""
    ones = [process(f"prefill-{n}") for n in range(prefills)] + [process(f"decode-{n}") for n in range(decodes)]
    links = [link(f"prefill-{p}", f"decode-{d}") for p in range(prefills) for d in range(decodes)]
    proxy = process("proxy", kind="proxy", running=None, waiting=None, kv_used=None, tokens_per_s=None, leases=None,
                    prefix_hit_rate=None)  # fmt: skip
    return status(*ones, proxy, links=tuple(links), **changed)


def event(kind: str, message: str, name: str = "decode-0", **detail: object) -> Event:
    return Event(cursor="", at="2026-11-29T02:00:00.000+00:00", process=name, event=kind, message=message,
                 detail=detail)  # fmt: skip


_TEXT = st.text(max_size=300)
_NUMBER = st.none() | st.integers(0, 10**9)

PROCESSES = st.builds(
    process,
    name=st.sampled_from(["prefill-0", "prefill-11", "decode-0", "decode-7", "hybrid-3", "store", "proxy"]) | _TEXT,
    role=st.sampled_from(["prefill", "decode", "hybrid", "store", "command", "proxy"]),
    kind=st.sampled_from(["builtin", "proxy"]),
    state=st.sampled_from(STATES), reason=_TEXT, phase=_TEXT, phase_s=st.none() | st.floats(0, 1e6),
    restarts=st.integers(0, 10**6), last_exit=st.none() | st.builds(exited, _TEXT), running=_NUMBER, waiting=_NUMBER,
    kv_used=st.none() | st.floats(0, 1), tokens_per_s=st.none() | st.floats(0, 1e9), rss_bytes=st.none() |
    st.integers(0, 1 << 45), gpus=st.lists(st.just("GPU-0123456789abcdef"), max_size=2).map(tuple),
    planned_role=st.sampled_from(["", "prefill"]), leaving_role=st.sampled_from(["", "prefill", "decode"]),
    leaving_work=_NUMBER, ready_since=st.none() | st.just("2026-11-29T02:00:00+00:00"),
)  # fmt: skip
LINKS = st.builds(link, _TEXT, _TEXT, transport=st.sampled_from(["", "shm", "mooncake"]), fallback=st.just("") | _TEXT,
                  error=st.just("") | _TEXT, gbps=st.floats(0, 1e4), bytes=st.integers(0, 1 << 50))  # fmt: skip
STATUSES = st.builds(
    lambda processes, links, others, state: status(*processes, links=tuple(links), attached=tuple(others), state=state),
    st.lists(PROCESSES, max_size=30), st.lists(LINKS, max_size=30),
    st.lists(st.builds(attached, _TEXT, answers=st.none() | st.booleans()), max_size=3),
    st.sampled_from(["starting", "ready", "degraded", "failed", "stopping"]),
)  # fmt: skip
EVENTS = st.builds(event, st.sampled_from(["ready", "exited", "failed", "phase"]), _TEXT, _TEXT)
