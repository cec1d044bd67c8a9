"""The server's answers: the page's files, updates as they happen, and what a page asks for once.

Updates are lines of JSON in one answer without an end. They are not server-sent events, because a browser's client for
those cannot send the token in a header, and an address would be written into logs.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol, get_args
from urllib.parse import parse_qs, unquote

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pdctl import __version__
from pdctl.control_api import ExitReport, MeasuredStatus, RoleName, RoleOrder, ServiceStatus, Verb
from pdctl.net.asgi import while_connected
from pdctl.proxy_wire import RecentRequest
from pdctl.supervisor.dashboard.access import Gate, Needs
from pdctl.supervisor.dashboard.feed import Feed
from pdctl.supervisor.dashboard.files import SAFETY, file_answer
from pdctl.supervisor.dashboard.findings import DoctorRuns
from pdctl.supervisor.dashboard.history import FULL_KEPT
from pdctl.supervisor.dashboard.messages import About, ExitsShown, Frame, GpuName, Requests, Said
from pdctl.supervisor.dashboard.sampler import WATCHED_S, Sampler, Viewers

_MOST_VIEWERS = 16
_MOST_LEASES = 100
_LONGEST_SPAN_S = 24 * 3600.0
_POINTS = 900
# Two updates of one page have at least this time between them, seconds.
_LEAST_GAP_S = 0.2
# A page that does not read for so long has its stream ended, seconds.
_SEND_S = 30.0
_VERBS: dict[str, Verb] = {verb: verb for verb in get_args(Verb)}
_ROLES: dict[str, RoleName] = {role: role for role in get_args(RoleName)}

Headers = Mapping[bytes, bytes]
Query = Mapping[str, list[str]]
Answer = Callable[[Query], Awaitable[msgspec.Struct]]


class Shown(Protocol):
    """What the page shows of a service, and may do to it."""

    def status(self) -> ServiceStatus: ...
    async def fresh_status(self) -> MeasuredStatus: ...
    def exits(self) -> tuple[ExitReport, ...]: ...
    async def recent(self) -> tuple[RecentRequest, ...]: ...
    def ask(self, name: str, verb: Verb, drain: bool) -> str: ...
    def change_role(self, name: str, call: RoleOrder) -> str: ...


class DashboardApp:
    """An ASGI application. `ended` is set when the service is down: then all updates end. `node`: of a cluster, the one
    whose part is shown."""

    def __init__(
        self,
        shown: Shown,
        gate: Gate,
        viewers: Viewers,
        sampler: Sampler,
        feed: Feed,
        doctor: DoctorRuns,
        gpus: tuple[GpuName, ...],
        node: str = "",
    ) -> None:
        self.ended = asyncio.Event()
        self._shown = shown
        self._gate = gate
        self._viewers = viewers
        self._sampler = sampler
        self._feed = feed
        self._doctor = doctor
        self._gpus = gpus
        self._machine = socket.gethostname() + (f", node {node}" if node else "")
        self._asked: dict[tuple[str, str], Answer] = {
            ("GET", "/api/history"): self._history,
            ("GET", "/api/requests"): self._requests,
            ("GET", "/api/exits"): self._exits,
            ("GET", "/api/measured"): self._measured,
            ("GET", "/api/doctor"): self._findings,
            ("POST", "/api/doctor"): self._findings_again,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        assert scope["type"] == "http"
        method, path, headers = scope["method"], scope["path"], dict(scope["headers"])
        is_api = path.startswith("/api/")
        is_change = path.startswith("/api/processes/")
        needs = Needs.WRITE if is_change else Needs.READ if is_api else Needs.FILE
        if (refused := self._gate.refusal(needs, headers)) is not None:
            await _json(Said(False, refused.reason), refused.status)(scope, receive, send)
        elif (method, path) == ("GET", "/api/live"):
            await self._live(headers, scope, receive, send)
        else:
            await (await self._answer(method, path, scope["query_string"]))(scope, receive, send)

    async def _answer(self, method: str, path: str, query: bytes) -> Response:
        if not path.startswith("/api/"):
            return file_answer(method, path)
        wanted = parse_qs(query.decode("latin-1"))
        if path.startswith("/api/processes/"):
            return self._change(method, path, wanted)
        if (answer := self._asked.get((method, path))) is None:
            return _json(Said(False, f"There is no {method} {path}."), 404)
        return _json(await answer(wanted))

    # -- updates -------------------------------------------------------------------------------------------

    async def _live(self, headers: Headers, scope: Scope, receive: Receive, send: Send) -> None:
        if len(self._viewers) >= _MOST_VIEWERS:
            told = Said(False, f"{_MOST_VIEWERS} pages are open already: close one of them.")
            await _json(told, 503)(scope, receive, send)
            return
        start = {"type": "http.response.start", "status": 200, "headers": _stream_headers()}
        about = About(
            machine=self._machine,
            version=__version__,
            write=self._gate.may_write(headers),
            gpus=self._gpus,
            full_s=FULL_KEPT * WATCHED_S,
            verbs=tuple(_VERBS),
        )
        await send(start)
        await while_connected(receive, lambda: self._updates(about, send))

    async def _updates(self, about: About, send: Send) -> None:
        """Send updates until the page is closed, or the service is down."""
        sample, event = self._sampler.now() - FULL_KEPT * WATCHED_S, 0
        first: About | None = about
        with self._viewers.watching() as pulse:
            while True:
                pulse.clear()
                is_last = self.ended.is_set()
                frame = self._frame(sample, event, first)
                sample, event, first = _newest(frame, sample), self._feed.total, None
                if not await _was_sent(send, frame, is_last) or is_last:
                    return
                await asyncio.sleep(_LEAST_GAP_S)
                await pulse.wait()

    def _frame(self, after_sample: float, after_event: int, about: About | None) -> Frame:
        self._feed.read()
        look = self._sampler.last
        leases = look.kv.leases if look is not None else ()
        return Frame(
            now=round(self._sampler.now(), 3),
            service=self._shown.status(),
            engines=self._sampler.engines,
            silent=look.kv.unreachable if look is not None else {},
            leases=tuple(sorted(leases, key=lambda lease: (not lease.leak, -lease.age_s))[:_MOST_LEASES]),
            leases_total=len(leases),
            samples=self._sampler.history.after(after_sample),
            events=self._feed.after(after_event),
            last_exit="".join(f"{exit.process}/{exit.epoch}" for exit in self._shown.exits()[-1:]),
            about=about,
        )

    # -- what a page asks for ------------------------------------------------------------------------------

    async def _history(self, query: Query) -> msgspec.Struct:
        try:
            seconds = min(_LONGEST_SPAN_S, max(60.0, float(query.get("span_s", ["900"])[0])))
        except ValueError:
            seconds = 900.0
        return _Samples(self._sampler.history.span(self._sampler.now(), seconds, _POINTS))

    async def _requests(self, _: Query) -> msgspec.Struct:
        return Requests(await self._shown.recent())

    async def _exits(self, _: Query) -> msgspec.Struct:
        return ExitsShown(self._shown.exits()[::-1])

    async def _measured(self, _: Query) -> msgspec.Struct:
        return await self._shown.fresh_status()

    async def _findings(self, _: Query) -> msgspec.Struct:
        return self._doctor.ask(again=False)

    async def _findings_again(self, _: Query) -> msgspec.Struct:
        return self._doctor.ask(again=True)

    # -- changes -------------------------------------------------------------------------------------------

    def _change(self, method: str, path: str, query: Query) -> Response:
        name, _, verb = unquote(path.removeprefix("/api/processes/")).partition("/")
        if method != "POST":
            return _json(Said(False, "Changes are made with POST."), 405)
        if verb == "role":
            role = _ROLES.get(query.get("to", [""])[0])
            if role is None:
                return _json(Said(False, f"Choose one of the roles {', '.join(_ROLES)}."), 400)
            return _done(self._shown.change_role(name, RoleOrder(role=role)))
        if verb not in _VERBS:
            return _json(Said(False, f"There is no action {verb!r}."), 404)
        return _done(self._shown.ask(name, _VERBS[verb], query.get("drain") == ["1"]))


class _Samples(msgspec.Struct):
    samples: dict[str, list[float | None]]


def _newest(frame: Frame, before: float) -> float:
    """The time of the newest sample that a page has."""
    times = frame.samples["at"]
    # Times were rounded: the same sample must not come twice.
    return times[-1] + 0.001 if times and times[-1] is not None else before


def _stream_headers() -> list[tuple[bytes, bytes]]:
    kind = [(b"content-type", b"application/x-ndjson"), (b"x-accel-buffering", b"no")]
    return [*kind, *((name.encode(), value.encode()) for name, value in SAFETY.items())]


async def _was_sent(send: Send, frame: Frame, is_last: bool) -> bool:
    """Send an update. False for a page that does not read."""
    body = msgspec.json.encode(frame) + b"\n"
    try:
        async with asyncio.timeout(_SEND_S):
            await send({"type": "http.response.body", "body": body, "more_body": not is_last})
    except TimeoutError:
        return False
    return True


def _done(reason: str) -> Response:
    """The answer to a change. Reasons of the service have no capital and no full stop."""
    told = f"{reason[:1].upper()}{reason[1:]}." if reason else ""
    return _json(Said(not reason, told), 409 if reason else 200)


def _json(answer: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(answer), status, SAFETY, "application/json")
