"""Updates of the running proxies: added, removed and draining engines, and changed settings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import count
from typing import TypeVar

import msgspec

from pdctl.net import reachable
from pdctl.net.http_client import ConnectionPool, Unreachable
from pdctl.net.identity import ContextFactory
from pdctl.net.internal_calls import Caller
from pdctl.plan import Attached, Plan, ProcessSpec
from pdctl.proxy_wire import (
    EngineAddress,
    EngineLoad,
    Figures,
    KeySettings,
    KeysReply,
    PoolReply,
    ProxyConfig,
    Quarantined,
    RecentReply,
    RecentRequest,
    SpentNews,
    SpentReply,
)
from pdctl.supervisor.rundir.rundir import RunDir

Answer = TypeVar("Answer", bound=msgspec.Struct)

_RELOAD_S = 5.0
# For what nothing waits for: figures of the live page, news of other nodes. Seconds.
_LOOK_S = 1.0
_TRIES = 3


class Nothing(msgspec.Struct, frozen=True):
    """An empty body."""


class Slots:
    """Numbers of engines, constant while an engine is in the plan: a proxy's workers share memory by these numbers."""

    def __init__(self) -> None:
        self._taken: dict[str, int] = {}

    def of(self, names: Iterable[str]) -> dict[str, int]:
        """The number of each name. Numbers of all other names become free."""
        wanted = dict.fromkeys(names)
        self._taken = {name: slot for name, slot in self._taken.items() if name in wanted}
        used = set(self._taken.values())
        free = (number for number in count() if number not in used)
        for name in wanted:
            if name not in self._taken:
                self._taken[name] = next(free)
        return self._taken


class Proxies:
    """Calls to the proxies. `serving` returns those that answer now; `tls`: for those that want certificates."""

    def __init__(
        self,
        run_dir: RunDir,
        secret: str,
        serving: Callable[[], list[ProcessSpec]],
        tls: ContextFactory | None = None,
    ) -> None:
        self._tls = tls
        self.draining: set[str] = set()
        # Engines that get no requests for a moment, and how often each engine was swept.
        self.paused: set[str] = set()
        # Engines that registered themselves, and those of them that were removed and still have requests.
        self.registered: Callable[[], Sequence[Attached]] = tuple
        self.leaving: set[str] = set()
        # Engines whose streams go on elsewhere, beside those that drain.
        self.moving: set[str] = set()
        self.swept: dict[str, int] = {}
        # Engines of other nodes, and those of them that drain.
        self.remote: Callable[[], Sequence[EngineAddress]] = tuple
        self.remote_draining: Callable[[], set[str]] = set
        self.calls_elsewhere: Callable[[str], Awaitable[int]] = _none
        self.unlinked: Callable[[Sequence[EngineAddress]], dict[str, list[str]]] = lambda _: {}
        self._run_dir = run_dir
        self._serving = serving
        self._caller = Caller(secret)
        self._slots = Slots()
        self._lock = asyncio.Lock()

    def write(self, plan: Plan) -> None:
        """Write the file that proxies read at their start."""
        self._run_dir.write_json("proxy.json", msgspec.to_builtins(self._config(plan)))

    async def tell(self, plan: Plan) -> str:
        """Update every running proxy to the plan and the draining engines. Returns why one failed, or ""."""
        async with self._lock:
            try:
                self.write(plan)
            except OSError as failure:
                return f"proxy.json cannot be written: {failure}"
            said = await asyncio.gather(*(self._reload(spec) for spec in self._serving()))
        return "; ".join(filter(None, said))

    async def calls_at(self, engine: str) -> int:
        """How many calls keep an engine from being idle: of this machine's proxies, or, where these have none, of other
        nodes'."""
        return await self.own_calls_at(engine) or await self.calls_elsewhere(engine)

    async def own_calls_at(self, engine: str) -> int:
        """Those of this machine's proxies. A proxy that does not answer counts as having none."""
        return sum(load.calls for load in await self.loads_at(engine))

    async def loads_at(self, engine: str) -> list[EngineLoad]:
        """What each proxy that answers says of an engine."""
        return (await self.loads()).get(engine, [])

    async def loads(self) -> dict[str, list[EngineLoad]]:
        """What each proxy that answers says of its engines, by engine."""
        found: dict[str, list[EngineLoad]] = {}
        asked = (self._get(spec, "/pdctl/v1/pool", PoolReply) for spec in self._serving())
        for reply in await asyncio.gather(*asked):
            for name, load in reply.engines.items() if reply else ():
                found.setdefault(name, []).append(load)
        return found

    async def keys(self) -> list[KeysReply]:
        """What each proxy that answers says of the API keys."""
        asked = (self._get(spec, "/pdctl/v1/keys", KeysReply) for spec in self._serving())
        return [reply for reply in await asyncio.gather(*asked) if reply is not None]

    async def figures(self) -> dict[str, Figures]:
        """What each proxy that answers has counted, by its name."""
        specs = self._serving()
        replies = await asyncio.gather(*(self._get(spec, "/pdctl/v1/figures", Figures, _LOOK_S) for spec in specs))
        return {spec.name: reply for spec, reply in zip(specs, replies, strict=True) if reply is not None}

    async def recent(self) -> tuple[RecentRequest, ...]:
        """The last requests of all proxies that answer, newest first."""
        asked = (self._get(spec, "/pdctl/v1/recent", RecentReply, _LOOK_S) for spec in self._serving())
        found = [request for reply in await asyncio.gather(*asked) if reply is not None for request in reply.requests]
        return tuple(sorted(found, key=lambda request: -request.at))

    async def quarantined(self, told: dict[str, float] | None) -> dict[str, float]:
        """Tell each proxy which bodies are in quarantine elsewhere (None: not known), and return what they found."""
        path = "/pdctl/v1/quarantine"
        specs = self._serving()
        if told is None:
            asked = [self._get(spec, path, Quarantined, _LOOK_S) for spec in specs]
        else:
            asked = [self._post(spec, path, Quarantined(told), Quarantined) for spec in specs]
        found: dict[str, float] = {}
        for reply in await asyncio.gather(*asked):
            for name, left_s in reply.bodies.items() if reply is not None else ():
                found[name] = max(left_s, found.get(name, 0.0))
        return found

    async def spent(self, news: SpentNews) -> dict[str, SpentReply]:
        """Tell each proxy what API keys used elsewhere. Returns what they used at each that answers, by its name."""
        specs = self._serving()
        replies = await asyncio.gather(*(self._post(spec, "/pdctl/v1/spent", news, SpentReply) for spec in specs))
        return {spec.name: reply for spec, reply in zip(specs, replies, strict=True) if reply is not None}

    def keep_only(self, names: set[str]) -> None:
        """Forget what is known of other engines than these."""
        self.swept = {name: count for name, count in self.swept.items() if name in names}

    async def _reload(self, spec: ProcessSpec) -> str:
        deadline, reason = time.monotonic() + _RELOAD_S, ""
        for _ in range(_TRIES):
            try:
                pool = _at(spec, self._tls)
                try:
                    await self._caller.post(pool, "/pdctl/v1/reload", Nothing(), PoolReply, _RELOAD_S)
                finally:
                    pool.close()
            except Unreachable as failure:
                reason = f"{spec.name}: {failure}"
                if time.monotonic() > deadline:
                    break
                await asyncio.sleep(0.1)
                continue
            return ""
        return reason

    async def _get(
        self, spec: ProcessSpec, path: str, kind: type[Answer], within_s: float = _RELOAD_S
    ) -> Answer | None:
        pool = _at(spec, self._tls)
        try:
            return await self._caller.get(pool, path, kind, within_s)
        except Unreachable:
            return None
        finally:
            pool.close()

    async def _post(self, spec: ProcessSpec, path: str, message: msgspec.Struct, kind: type[Answer]) -> Answer | None:
        pool = _at(spec, self._tls)
        try:
            return await self._caller.post(pool, path, message, kind, _LOOK_S)
        except Unreachable:
            return None
        finally:
            pool.close()

    def _config(self, plan: Plan) -> ProxyConfig:
        engines = [_address(spec) for spec in plan.processes if spec.is_engine]
        engines += [EngineAddress(**asdict(attached)) for attached in (*plan.attached, *self.registered())]
        engines += self.remote()
        far = self.remote_draining()
        slots = self._slots.of(engine.name for engine in engines)
        proxy = plan.proxy
        return ProxyConfig(
            service=plan.service,
            model=plan.served_model_name,
            routing=proxy.routing,
            ttft_ms=plan.ttft_ms,
            tpot_ms=plan.tpot_ms,
            max_model_len=plan.max_model_len,
            engines=[msgspec.structs.replace(engine, slot=slots[engine.name]) for engine in engines],
            workers=proxy.workers,
            run_dir=plan.run_dir,
            admission=proxy.admission,
            max_queue=proxy.max_queue,
            max_body_mb=proxy.max_body_mb,
            unknown_fields=proxy.unknown_fields,
            api_keys=proxy.api_keys,
            keys=[KeySettings(**asdict(key)) for key in proxy.keys],
            tls_cert=proxy.tls_cert,
            tls_key=proxy.tls_key,
            cors_origins=list(proxy.cors_origins),
            access_log=proxy.access_log,
            otlp_endpoint=proxy.otlp_endpoint,
            takeover=proxy.takeover,
            accept_nodes=proxy.accept_nodes,
            node_keys=proxy.node_keys,
            draining=sorted(self.draining | self.paused | self.leaving | far),
            moving=sorted(self.draining | self.moving | far),
            unlinked=self.unlinked(engines),
            swept=dict(self.swept),
            # Running answers may finish during most of the time before the next signal.
            lease_s=plan.lease_s,
            drain_s=min(plan.supervision.drain_s, plan.supervision.grace_s * 0.9),
        )


async def _none(_: str) -> int:
    """One machine has no other proxies."""
    return 0


def _address(spec: ProcessSpec) -> EngineAddress:
    others = {purpose: port for purpose, port in spec.ports.items() if purpose != "http"}
    return EngineAddress(
        spec.name, spec.role, spec.kind, spec.host, spec.ports["http"], connector=spec.connector, ports=others,
        inline=spec.inline, role_epoch=spec.role_epoch, tls=spec.tls, kv_events=spec.kv_events,
    )  # fmt: skip


def _at(spec: ProcessSpec, tls: ContextFactory | None) -> ConnectionPool:
    """Connections to the control port if there is one, else to the address that clients use."""
    if "control" in spec.ports:
        return ConnectionPool(spec.host, spec.ports["control"], tls=tls if spec.tls else None)
    assert spec.listen is not None
    host, port = spec.listen
    return ConnectionPool(reachable(host), port)
