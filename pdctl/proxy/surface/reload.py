"""Reload the proxy's settings while it runs, on request of the supervisor."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pdctl.errors import PdctlError
from pdctl.proxy.client.keys import ANYONE, Keys
from pdctl.proxy.engines.engine import Engine
from pdctl.proxy.engines.kv_room import KvRoom
from pdctl.proxy.engines.routing import POLICIES
from pdctl.proxy.request.admission import Admission
from pdctl.proxy.request.generate import Completions
from pdctl.proxy.shares.rules import KeyRules
from pdctl.proxy.surface.internal import Internal, encoded, refused
from pdctl.proxy.telemetry.metrics import KEY_COUNTERS
from pdctl.proxy_wire import EngineLoad, KeysReply, KeyUse, PoolReply, ProxyConfig

_log = logging.getLogger(__name__)


def admission_of(config: ProxyConfig) -> Admission:
    """The rules of the queue."""
    ttft_s, tpot_s = config.ttft_ms / 1000, config.tpot_ms / 1000
    return Admission.of(config.admission, config.max_queue, ttft_s, tpot_s, KeyRules(config.keys))


class Reloader:
    """Applies changes of the configuration file. Raises PdctlError for invalid changes and then changes nothing."""

    def __init__(self, path: Path, config: ProxyConfig, completions: Completions, internal: Internal) -> None:
        self.config = config
        self._path = path
        self._completions = completions
        self._internal = internal

    def reload(self) -> None:
        """Apply the current content of the file."""
        try:
            wanted = msgspec.json.decode(self._path.read_bytes(), type=ProxyConfig)
        except (OSError, msgspec.DecodeError) as failure:
            raise PdctlError(f"{self._path} cannot be read: {failure}") from failure
        # Settings fixed at start stay unchanged until the process is restarted.
        wanted = msgspec.structs.replace(wanted, **{name: getattr(self.config, name) for name in ProxyConfig.FIXED})
        completions, shared = self._completions, self._completions.shared
        keys = Keys(wanted.api_keys) if wanted.api_keys != self.config.api_keys else completions.keys
        shared.pool.follow(wanted.engines, wanted.draining, wanted.admission == "slo", wanted.unlinked, wanted.moving)
        for engine in shared.pool.engines:
            if engine.room is not None and wanted.swept.get(engine.name, 0) != self.config.swept.get(engine.name, 0):
                engine.room.swept()
        completions.log.move_to(wanted.access_log)
        shared.policy = POLICIES[wanted.routing]
        shared.pool.wants_prefixes = wanted.routing == "prefix_aware"
        shared.ttft_s, shared.tpot_s = wanted.ttft_ms / 1000, wanted.tpot_ms / 1000
        shared.metrics.ttft_slo_s, shared.metrics.tpot_slo_s = shared.ttft_s, shared.tpot_s
        shared.lease_s = wanted.lease_s
        completions.door.admission.follow(admission_of(wanted))
        completions.accounts.follow(KeyRules(wanted.keys))
        completions.keys, completions.max_body = keys, int(wanted.max_body_mb * 2**20)
        completions.unknown.refuse = wanted.unknown_fields == "refuse"
        self.config = wanted
        _log.info("settings reloaded: %d engines, %d of them draining", len(wanted.engines), len(wanted.draining))

    def routes(self) -> list[Route]:
        """Internal routes, only for the supervisor."""
        return [
            self._internal.route("/pdctl/v1/reload", self._on_reload, "POST"),
            self._internal.route("/pdctl/v1/pool", self._on_pool),
            self._internal.route("/pdctl/v1/keys", self._on_keys),
        ]

    async def _on_reload(self, _: Request) -> Response:
        try:
            self.reload()
        except PdctlError as failure:
            return refused(409, str(failure))
        return self._pool()

    async def _on_pool(self, _: Request) -> Response:
        return self._pool()

    async def _on_keys(self, _: Request) -> Response:
        return encoded(KeysReply(self._keys()))

    def _keys(self) -> dict[str, KeyUse]:
        """What each API key has and had here."""
        completions = self._completions
        known, accounts = completions.door.admission.queue.states(), completions.accounts
        counts = completions.shared.metrics.counters.of_first_label(KEY_COUNTERS)
        found = {}
        for name in sorted({*completions.keys.names, *known, *counts} - {ANYONE}):
            state, remaining = known.get(name), accounts.remaining(name)
            requests, tokens = (None, None) if remaining is None else remaining
            settings = completions.door.admission.queue.rules.of(name)
            found[name] = KeyUse(
                **{field: counts.get(name, {}).get(counter, 0.0) for counter, field in KEY_COUNTERS.items()},
                running=state.running if state else 0,
                waiting=state.waiting if state else 0,
                requests_left=requests if settings.requests_per_minute else None,
                tokens_left=tokens if settings.tokens_per_minute else None,
            )
        return found

    def _pool(self) -> Response:
        pool = self._completions.shared.pool
        return encoded(PoolReply({engine.name: _load(engine) for engine in pool.engines}))


def _load(engine: Engine) -> EngineLoad:
    room = engine.room or KvRoom()
    return EngineLoad(
        # A request between its prefill call and its decode call still needs what prefill has for it.
        calls=max(len(engine.tickets), engine.handing_over),
        usable=engine.healthy,
        left=room.leaked,
        left_part=room.leaked / (room.tokens or 1),
        sent=room.sent,
        latency=tuple(round(seconds, 4) for seconds in engine.took_s),
        speeds=(round(engine.prompts.speed, 1), round(engine.streams.speed, 3)),
        avoids=tuple(sorted(engine.lost_peers(time.monotonic()))),
        beginnings=engine.prefixes.told,
        blocks=engine.prefixes.blocks,
    )
