"""Send requests and record the times of their answers. One process, one event loop. It also measures its own delay, so
that a slow client is not mistaken for a slow service."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from pdctl.bench import Asked, Record
from pdctl.errors import PdctlError
from pdctl.net.http_client import ConnectionPool, Exchange, Unreachable
from pdctl.wire import TIMING_HEADER

if TYPE_CHECKING:
    import ssl

_END = b"\n\n"
_TICK_S = 0.01
_CONNECT_S = 10.0
_TOKENIZE_S = 20.0


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: dict[str, object] = {}
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: object = None


_decode = msgspec.json.Decoder(_Event).decode


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and how to send requests. `headers`: complete header lines; `certificate`: a service's own certificate,
    trusted under any host name ("" for the system's CAs); `chat`: send chat requests instead of completions."""

    url: str
    model: str = ""
    headers: bytes = b""
    fields: dict[str, object] = field(default_factory=dict)
    timeout_s: float = 600.0
    certificate: str = ""
    chat: bool = False

    def pool(self) -> ConnectionPool:
        """A connection pool to the endpoint. Raises PdctlError for a malformed URL."""
        try:
            parts = urlsplit(self.url if "//" in self.url else f"http://{self.url}")
            host, port, path = parts.hostname, parts.port, parts.path.strip("/")
        except ValueError:
            host, port, path = None, None, ""
        # Other clients expect /v1 at the end of the URL; here it is part of the paths.
        if host is None or parts.scheme not in ("http", "https") or path not in ("", "v1"):
            hint = "such as http://127.0.0.1:8000 or https://example.org/v1"
            raise PdctlError(f"{self.url!r} is not the URL of a service", hint)
        if parts.scheme == "http":
            return ConnectionPool(host, port or 80, connect_s=_CONNECT_S)
        tls = self._tls()
        return ConnectionPool(host, port or 443, connect_s=_CONNECT_S, tls=lambda: tls)

    def _tls(self) -> ssl.SSLContext:
        import ssl

        context = ssl.create_default_context(cafile=self.certificate or None)
        context.check_hostname = not self.certificate
        return context

    def body(self, request: Asked) -> dict[str, object]:
        """The request body for this endpoint. Raises PdctlError for token ids if text is needed."""
        common = {
            "model": self.model, "max_tokens": request.max_tokens, "stream": True,
            "stream_options": {"include_usage": True}, "temperature": 0.0, **self.fields,
        }  # fmt: skip
        if not self.chat:
            return {**common, "prompt": request.prompt}
        if not isinstance(request.prompt, str):
            raise PdctlError(
                "--chat needs text, but the workload has token ids", "leave out --chat, or use a workload of text"
            )
        return {**common, "messages": [{"role": "user", "content": request.prompt}]}

    @property
    def path(self) -> str:
        """The path of requests."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"


@dataclass(slots=True)
class Headroom:
    """Resource use of the client itself: `cpu` as a fraction of a core; `delays` of its event loop in seconds."""

    cpu: float = 0.0
    delays: list[float] = field(default_factory=list)

    @property
    def delay_p99(self) -> float:
        """99th percentile of the event loop's delays."""
        ordered = sorted(self.delays)
        return ordered[int(0.99 * len(ordered))] if ordered else 0.0


@dataclass(slots=True)
class Run:
    """All records in the order of the workload. Requests that were never sent are missing."""

    records: list[Record] = field(default_factory=list)
    started_at: float = 0.0
    ended_at: float = 0.0
    most_at_once: int = 0
    headroom: Headroom = field(default_factory=Headroom)
    was_interrupted: bool = False


async def tokenized(endpoint: Endpoint, text: str) -> list[int]:
    """The service's token ids of a text; empty if it does not tokenize. Raises PdctlError if it cannot be reached."""
    pool = endpoint.pool()
    body = msgspec.json.encode({"model": endpoint.model, "prompt": text})
    try:
        answer = await pool.request("POST", "/tokenize", _head(endpoint), body, timeout_s=_TOKENIZE_S)
        found = msgspec.json.decode(answer.body, type=dict[str, object]) if answer.status == 200 else {}
    except Unreachable as failure:
        raise PdctlError(f"cannot reach {endpoint.url}: {failure}", "start a service with: pdctl up") from None
    except msgspec.DecodeError:
        found = {}
    finally:
        pool.close()
    tokens = found.get("tokens")
    return [token for token in tokens if type(token) is int] if isinstance(tokens, list) else []


async def models(endpoint: Endpoint) -> list[str]:
    """Names of the models that the service lists. Raises PdctlError."""
    pool = endpoint.pool()
    try:
        answer = await pool.request("GET", "/v1/models", endpoint.headers, timeout_s=_TOKENIZE_S)
        found = msgspec.json.decode(answer.body, type=dict[str, object])
        data = found.get("data")
        names = [str(card["id"]) for card in data] if isinstance(data, list) else []
    except Unreachable as failure:
        raise PdctlError(f"cannot reach {endpoint.url}: {failure}", "start a service with: pdctl up") from None
    except (msgspec.DecodeError, KeyError, TypeError):
        names = []
    finally:
        pool.close()
    if not names:
        raise PdctlError(f"{endpoint.url} lists no model at /v1/models", "set the model with --model")
    return names


async def drive(
    endpoint: Endpoint, asked: list[Asked], times: list[float], most_at_once: int, progress: Callable[[Run], None]
) -> Run:
    """Send each request at its time (seconds from now), at most `most_at_once` concurrently (0: no limit), and wait for
    all.

    If cancelled, it ends the running requests and returns the records so far, marked as interrupted.
    """
    run, pool = Run(started_at=time.monotonic()), endpoint.pool()
    seats = asyncio.Semaphore(most_at_once) if most_at_once else None
    cpu = time.process_time()
    at_once = 0

    async def one(request: Asked, record: Record) -> None:
        nonlocal at_once
        at_once += 1
        run.most_at_once = max(run.most_at_once, at_once)
        try:
            await _ask(endpoint, pool, request, record)
        finally:
            at_once -= 1
            if seats is not None:
                seats.release()

    async def send_all(tasks: asyncio.TaskGroup) -> None:
        for request, at in zip(asked, times, strict=True):
            planned = run.started_at + at
            if (wait := planned - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            if seats is not None:
                await seats.acquire()
                # Waiting for the concurrency limit is the service's delay, not the client's.
                planned = max(planned, time.monotonic())
            record = Record(planned_at=planned)
            run.records.append(record)
            tasks.create_task(one(request, record))

    try:
        async with asyncio.TaskGroup() as watching:
            watch = watching.create_task(_watch(run, progress))
            async with asyncio.TaskGroup() as tasks:
                await send_all(tasks)
            watch.cancel()
    except asyncio.CancelledError:
        run.was_interrupted = True
        current = asyncio.current_task()
        assert current is not None
        current.uncancel()
    finally:
        pool.close()
    run.ended_at = time.monotonic()
    run.headroom.cpu = (time.process_time() - cpu) / max(1e-9, run.ended_at - run.started_at)
    return run


async def _watch(run: Run, progress: Callable[[Run], None]) -> None:
    """Measure how late this event loop wakes up, and show progress."""
    shown_at = time.monotonic()
    while True:
        before = time.monotonic()
        await asyncio.sleep(_TICK_S)
        now = time.monotonic()
        run.headroom.delays.append(max(0.0, now - before - _TICK_S))
        if now - shown_at >= 1.0:
            shown_at = now
            progress(run)


def _head(endpoint: Endpoint) -> bytes:
    return b"%bcontent-type: application/json\r\n" % endpoint.headers


async def ask_once(endpoint: Endpoint, pool: ConnectionPool, request: Asked) -> Record:
    """Send one request now."""
    record = Record(planned_at=time.monotonic())
    await _ask(endpoint, pool, request, record)
    return record


async def _ask(endpoint: Endpoint, pool: ConnectionPool, request: Asked, record: Record) -> None:
    body = msgspec.json.encode(endpoint.body(request))
    lines = b"%b%b: 1\r\n" % (_head(endpoint), TIMING_HEADER.encode())
    exchange = pool.exchange("POST", endpoint.path, lines, body)
    record.sent_at = time.monotonic()
    try:
        async with asyncio.timeout(endpoint.timeout_s):
            await _read(exchange, record)
    except Unreachable as failure:
        record.error = str(failure)
    except TimeoutError:
        record.error = f"no complete answer within {endpoint.timeout_s:g} s"
    except asyncio.CancelledError:
        record.error = "interrupted"
        raise
    finally:
        record.ended_at = record.ended_at or time.monotonic()
        exchange.close()


async def _read(exchange: Exchange, record: Record) -> None:
    if await exchange.head() != 200:
        record.error = f"status {exchange.status}: {(await exchange.rest())[:200].decode(errors='replace')}"
        return
    reader = _Reader(record)
    while (data := await exchange.read()) is not None:
        reader.take(data, time.monotonic())
    record.is_truncated = not reader.is_done and not record.error
    record.text = "".join(reader.texts)
    if not record.first_at and not record.error and not record.is_truncated:
        record.error = "the answer had no token"
    record.has_usage = reader.has_usage
    if not reader.has_usage and record.first_at:
        # One token per event: too few if an event carries several.
        record.output_tokens = len(record.gaps) + 1


class _Reader:
    """Parses the events of one stream as they arrive."""

    def __init__(self, record: Record) -> None:
        self.is_done = False
        self.has_usage = False
        self.texts: list[str] = []
        self._record = record
        self._rest = b""
        self._last_at = 0.0

    def take(self, data: bytes, now: float) -> None:
        """Take the data of one read. An incomplete event at its end is kept for the next read."""
        whole = self._rest + data
        if b"\r" in whole:
            # A \r at the end may be half a line end: it stays for the next read.
            whole = whole.replace(b"\r\n", b"\n")
        *events, self._rest = whole.split(_END)
        for event in events:
            if event.startswith(b"data:"):
                payload = event[5:].strip()
                if payload == b"[DONE]":
                    self.is_done = True
                else:
                    self._event(payload, now)
            elif event.startswith(b": " + TIMING_HEADER.encode()):
                said = event.decode(errors="replace").rpartition(f"{TIMING_HEADER} ")[2]
                self._record.parts, self._record.engines = timing_parts(said)

    def _event(self, payload: bytes, now: float) -> None:
        record = self._record
        try:
            event = _decode(payload)
        except msgspec.DecodeError as failure:
            record.error = f"malformed event: {failure}"
            return
        if event.error is not None:
            record.error = f"error in the stream: {event.error}"[:300]
        if event.usage is not None:
            self.has_usage = True
            record.input_tokens, record.output_tokens = event.usage.prompt_tokens, event.usage.completion_tokens
        if event.choices:
            self.texts.append(event.choices[0].text or str(event.choices[0].delta.get("content") or ""))
            # As in vLLM's tool: the first event with a choice counts as the first token, even with empty text.
            if record.first_at:
                record.gaps.append(now - self._last_at)
            else:
                record.first_at = now
            self._last_at = record.ended_at = now


def timing_parts(said: str) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds and engines by name, parsed from `name;dur=MILLISECONDS;desc=ENGINE, ...`. The rest is ignored."""
    seconds, engines = {}, {}
    for part in said.split(","):
        name, *told = part.strip().split(";")
        for key, _, value in (word.partition("=") for word in told):
            if key == "desc":
                engines[name] = value.strip('"')
            elif key == "dur":
                with suppress(ValueError):
                    seconds[name] = float(value) / 1000
    return seconds, engines
